"""Prompt-side values: what a model's input functions take and return."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import transformers

from aphrodite_jax.config import ModelConfig

__all__ = ["DummyData", "InputContext", "LLMInputs", "PlaceholderRange"]

ConfigT = TypeVar("ConfigT", bound=transformers.PretrainedConfig)


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
    """A tokenized prompt with its media.

    Attributes:
      prompt_token_ids: token ids; after processing, with one token per row of encoded media.
      prompt: the text they came from, if there was one.
      multi_modal_data: modality to its items, as the user gave them.
      placeholders: modality to the ranges of its items, in the order of the items.
    """

    prompt_token_ids: tuple[int, ...]
    prompt: str | None = None
    multi_modal_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    placeholders: Mapping[str, tuple[PlaceholderRange, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DummyData:
    """A prompt of the largest legal size, for profiling."""

    prompt_token_ids: tuple[int, ...]
    multi_modal_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InputContext:
    """What a model's input functions may know."""

    model_config: ModelConfig

    def get_hf_config(self, hf_config_type: type[ConfigT] = transformers.PretrainedConfig) -> ConfigT:
        """The Hugging Face config, checked to be of ``hf_config_type``.

        Raises:
          TypeError: it is of another type.
        """
        config = self.model_config.hf_config
        if not isinstance(config, hf_config_type):
            raise TypeError(f"expected a {hf_config_type.__name__}, the model has a {type(config).__name__}")
        return config
