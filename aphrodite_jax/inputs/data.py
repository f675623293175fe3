"""Prompt-side values: what a model's input functions take and return."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["DummyData", "LLMInputs", "PlacedItem", "PlaceholderRange"]


@dataclasses.dataclass(frozen=True)
class PlaceholderRange:
    """Tokens ``[offset, offset + length)`` of a prompt that stand for one media item.

    Attributes:
      is_row: for each of them, whether it stands for a row of the encoded item; the others are text that the item
        brings with it (the end of a line of tiles, say). None: all of them stand for rows.
    """

    offset: int
    length: int
    is_row: tuple[bool, ...] | None = dataclasses.field(default=None, repr=False)

    @property
    def stop(self) -> int:
        """First token after the range."""
        return self.offset + self.length

    @property
    def num_rows(self) -> int:
        """Rows of the encoded item."""
        return self.length if self.is_row is None else sum(self.is_row)

    @functools.cached_property
    def row_tokens(self) -> np.ndarray:
        """Where in the prompt the tokens stand that are rows, in the order of the rows, int64 ``[rows]``."""
        if self.is_row is None:
            return np.arange(self.offset, self.stop)
        return self.offset + np.flatnonzero(self.is_row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedItem:
    """A mapped item and the place of its tokens in the prompt.

    ``mm_kwargs`` are the mapper's arrays with an axis of one item first; None where the item is embeddings.
    """

    modality: str
    placeholder: PlaceholderRange
    mm_kwargs: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMInputs:
    """A tokenized prompt with its media. Its mappings are read-only copies of those given.

    Attributes:
      prompt_token_ids: token ids; after processing, with one token per row of encoded media.
      prompt: the text they came from, if there was one.
      multi_modal_data: modality to its items: as the user gave them, or, for an input processor, a tuple of
        opened items.
      placeholders: modality to the ranges of its items, in the order of the items.
    """

    prompt_token_ids: tuple[int, ...]
    prompt: str | None = None
    multi_modal_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    placeholders: Mapping[str, tuple[PlaceholderRange, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        ranges = {modality: tuple(found) for modality, found in self.placeholders.items()}
        object.__setattr__(self, "prompt_token_ids", tuple(map(int, self.prompt_token_ids)))
        object.__setattr__(self, "multi_modal_data", MappingProxyType(dict(self.multi_modal_data)))
        object.__setattr__(self, "placeholders", MappingProxyType(ranges))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DummyData:
    """A prompt of the largest legal size, for profiling: as a user would give it, before processing."""

    prompt_token_ids: tuple[int, ...]
    multi_modal_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
