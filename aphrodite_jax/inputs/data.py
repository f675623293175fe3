"""Prompt-side values: what a model's input functions take and return."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["DummyData", "LLMInputs", "PlaceholderRange"]


@dataclasses.dataclass(frozen=True)
class PlaceholderRange:
    """Tokens ``[offset, offset + length)`` of a prompt that stand for one media item."""

    offset: int
    length: int

    @property
    def stop(self) -> int:
        """First token after the range."""
        return self.offset + self.length


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
