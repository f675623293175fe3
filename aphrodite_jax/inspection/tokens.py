"""Token ids as a reader wants to see them."""

from collections.abc import Iterable

__all__ = ["token_texts"]


def token_texts(tokenizer, token_ids: Iterable[int], vocab_size: int) -> tuple[str, ...]:
    """The text of each token by itself, special tokens too; ``<id>`` where there is no tokenizer or no such token."""
    return tuple(
        tokenizer.decode([token]) if tokenizer is not None and 0 <= token < vocab_size else f"<{token}>"
        for token in map(int, token_ids)
    )
