"""Placeholder tokens: one a media item in what a user writes, one a row in what the model reads.

Most input processors and dummy data functions are one call of these.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from aphrodite_jax.errors import ConfigError, PlaceholderError
from aphrodite_jax.inputs.data import DummyData, LLMInputs, PlaceholderRange

__all__ = ["Tokens", "dummy_prompt", "dummy_prompt_of", "expand_items", "expand_placeholders"]

Tokens = int | Sequence[int]
"""What an item's placeholder becomes: so many times itself, or a sequence of tokens."""


def expand_items(
    inputs: LLMInputs, modality: str, placeholder: int, items: Sequence[Tokens], *, row_token: int | None = None
) -> LLMInputs:
    """New inputs, in which the token ``placeholder`` of the i-th item of a modality has become ``items[i]``.

    Modalities are expanded one after another: ranges of those before move with their tokens.

    Raises:
      PlaceholderError: as `expand_placeholders`.
    """
    tokens, ranges = expand_placeholders(inputs.prompt_token_ids, placeholder, items, row_token=row_token)
    moved = {other: _moved(spans, ranges) for other, spans in inputs.placeholders.items()}
    return LLMInputs(
        prompt_token_ids=tokens,
        prompt=inputs.prompt,
        multi_modal_data=inputs.multi_modal_data,
        placeholders={**moved, modality: ranges} if items else moved,
    )


def _moved(spans: Sequence[PlaceholderRange], grown: Sequence[PlaceholderRange]) -> tuple[PlaceholderRange, ...]:
    """Ranges of a prompt in which one token each has become the ``grown`` ones."""
    added = np.cumsum([0, *(span.length - 1 for span in grown)])
    places = [span.offset - before for span, before in zip(grown, added, strict=False)]
    return tuple(
        dataclasses.replace(span, offset=span.offset + int(added[np.searchsorted(places, span.offset)]))
        for span in spans
    )


def dummy_prompt(
    seq_len: int, modality: str, placeholder: int, items: Sequence[Any], tokens_per_item: int
) -> DummyData:
    """Each item behind its placeholder token, then padding, so that the processed prompt has ``seq_len`` tokens.

    Raises:
      ConfigError: the items take more than that.
    """
    return dummy_prompt_of(seq_len, **{modality: (placeholder, items, tokens_per_item)})


def dummy_prompt_of(seq_len: int, **kinds: tuple[int, Sequence[Any], int]) -> DummyData:
    """As `dummy_prompt` for several modalities: the placeholder, items and tokens per item of each.

    Raises:
      ConfigError: the items take more than ``seq_len`` tokens.
    """
    padding = seq_len - sum(len(items) * tokens for _, items, tokens in kinds.values())
    if padding < 0:
        sizes = (f"{len(items)} {modality} items of up to {tokens}" for modality, (_, items, tokens) in kinds.items())
        raise ConfigError(
            f"{' and '.join(sizes)} tokens do not fit in {seq_len} tokens: lower limit_mm_per_prompt or raise "
            "max_model_len"
        )
    placeholders = [placeholder for placeholder, items, _ in kinds.values() for _ in items]
    return DummyData(
        prompt_token_ids=(*placeholders, *[0] * padding),
        multi_modal_data={modality: list(items) for modality, (_, items, _) in kinds.items()},
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
