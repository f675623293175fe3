"""Placeholder tokens: one a media item in what a user writes, one a row in what the model reads.

Most input processors and dummy data functions are one call of these.
"""

from collections.abc import Sequence
from typing import Any

from aphrodite_jax.errors import ConfigError, PlaceholderError
from aphrodite_jax.inputs.data import DummyData, LLMInputs, PlaceholderRange

__all__ = ["Tokens", "dummy_prompt", "expand_items", "expand_placeholders"]

Tokens = int | Sequence[int]
"""What an item's placeholder becomes: so many times itself, or a sequence of tokens."""


def expand_items(
    inputs: LLMInputs, modality: str, placeholder: int, items: Sequence[Tokens], *, row_token: int | None = None
) -> LLMInputs:
    """New inputs, in which the token ``placeholder`` of the i-th item of a modality has become ``items[i]``.

    Raises:
      PlaceholderError: as `expand_placeholders`.
    """
    tokens, ranges = expand_placeholders(inputs.prompt_token_ids, placeholder, items, row_token=row_token)
    return LLMInputs(
        prompt_token_ids=tokens,
        prompt=inputs.prompt,
        multi_modal_data=inputs.multi_modal_data,
        placeholders={**inputs.placeholders, modality: ranges} if items else inputs.placeholders,
    )


def dummy_prompt(
    seq_len: int, modality: str, placeholder: int, items: Sequence[Any], tokens_per_item: int
) -> DummyData:
    """Each item behind its placeholder token, then padding, so that the processed prompt has ``seq_len`` tokens.

    Raises:
      ConfigError: the items take more than that.
    """
    padding = seq_len - len(items) * tokens_per_item
    if padding < 0:
        raise ConfigError(
            f"{len(items)} {modality} items of up to {tokens_per_item} tokens do not fit in {seq_len} tokens: lower "
            "limit_mm_per_prompt or raise max_model_len"
        )
    return DummyData(
        prompt_token_ids=(placeholder,) * len(items) + (0,) * padding, multi_modal_data={modality: list(items)}
    )


def expand_placeholders(
    token_ids: Sequence[int], placeholder: int, items: Sequence[Tokens], *, row_token: int | None = None
) -> tuple[tuple[int, ...], tuple[PlaceholderRange, ...]]:
    """Put ``items[i]`` in the place of the i-th ``placeholder``.

    Args:
      token_ids: of a prompt.
      placeholder: the token id that stands for an item.
      items: what each becomes, in their order: so many ``row_token``, or tokens of which each ``row_token`` stands for
        a row and the others are text.
      row_token: the placeholder, if none is given.

    Returns:
      The new token ids, and the range of each item in them.

    Raises:
      PlaceholderError: there are not as many placeholders as items, or an item has no row.
    """
    row_token = placeholder if row_token is None else row_token
    count = sum(token == placeholder for token in token_ids)
    if count != len(items):
        raise PlaceholderError(
            f"the prompt has {count} placeholders (token {placeholder}) for {len(items)} items: "
            "write one for each item; it is expanded here"
        )
    expanded: list[int] = []
    ranges: list[PlaceholderRange] = []
    for token in token_ids:
        if token != placeholder:
            expanded.append(token)
            continue
        item = items[len(ranges)]
        tokens = (row_token,) * item if isinstance(item, int) else tuple(item)
        is_row = tuple(token == row_token for token in tokens)
        if not any(is_row):
            raise PlaceholderError(f"an item takes at least one token, got lengths {list(items)}")
        ranges.append(PlaceholderRange(len(expanded), len(tokens), None if all(is_row) else is_row))
        expanded.extend(tokens)
    return tuple(expanded), tuple(ranges)
