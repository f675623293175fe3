"""Placeholder tokens: one a media item in what a user writes, one a row in what the model reads."""

from collections.abc import Sequence

from aphrodite_jax.errors import PlaceholderError
from aphrodite_jax.inputs.data import PlaceholderRange

__all__ = ["expand_placeholders"]


def expand_placeholders(
    token_ids: Sequence[int], placeholder: int, lengths: Sequence[int]
) -> tuple[tuple[int, ...], tuple[PlaceholderRange, ...]]:
    """Repeat the i-th ``placeholder`` token ``lengths[i]`` times.

    Args:
      token_ids: of a prompt.
      placeholder: the token id that stands for an item.
      lengths: tokens that each item takes, in the order of the items; at least 1.

    Returns:
      The new token ids, and the range of each item in them.

    Raises:
      PlaceholderError: there are not as many placeholders as items, or a length is below 1.
    """
    count = sum(token == placeholder for token in token_ids)
    if count != len(lengths):
        raise PlaceholderError(
            f"the prompt has {count} placeholders (token {placeholder}) for {len(lengths)} items: "
            "write one for each item; it is expanded here"
        )
    if any(length < 1 for length in lengths):
        raise PlaceholderError(f"an item takes at least one token, got lengths {list(lengths)}")
    expanded: list[int] = []
    ranges: list[PlaceholderRange] = []
    for token in token_ids:
        if token == placeholder:
            length = lengths[len(ranges)]
            ranges.append(PlaceholderRange(len(expanded), length))
            expanded.extend([token] * length)
        else:
            expanded.append(token)
    return tuple(expanded), tuple(ranges)
