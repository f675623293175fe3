"""Placeholder tokens: one a media item in what a user writes, one a row in what the model reads.

Most input processors and dummy data functions are one call of these.
"""

from collections.abc import Sequence
from typing import Any

from aphrodite_jax.errors import ConfigError, PlaceholderError
from aphrodite_jax.inputs.data import DummyData, LLMInputs, PlaceholderRange

__all__ = ["dummy_prompt", "expand_items", "expand_placeholders"]


def expand_items(inputs: LLMInputs, modality: str, placeholder: int, lengths: Sequence[int]) -> LLMInputs:
    """New inputs, in which the token ``placeholder`` of the i-th item of a modality is repeated ``lengths[i]`` times.

    Raises:
      PlaceholderError: as `expand_placeholders`.
    """
    tokens, ranges = expand_placeholders(inputs.prompt_token_ids, placeholder, lengths)
    return LLMInputs(
        prompt_token_ids=tokens,
        prompt=inputs.prompt,
        multi_modal_data=inputs.multi_modal_data,
        placeholders={**inputs.placeholders, modality: ranges} if lengths else inputs.placeholders,
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
