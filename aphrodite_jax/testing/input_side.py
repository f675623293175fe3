"""What a model's input functions make of prompts and items, called one by one."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.inputs import INPUT_REGISTRY, InputContext, LLMInputs
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.testing.strategies import Request

__all__ = ["Arrays", "InputSide"]

Arrays = dict[str, np.ndarray]
"""Of one item by keyword, with an axis of one item first."""


@dataclasses.dataclass(kw_only=True, eq=False)
class InputSide:
    """A model class, the config of its checkpoint, and its registered functions.

    Attributes:
      placeholders: modality to the token that stands for an item in a prompt.
    """

    model_cls: Any
    hf_config: transformers.PretrainedConfig
    model_config: ModelConfig
    placeholders: Mapping[str, int]

    @property
    def context(self) -> InputContext:
        """What the model's input functions get."""
        return InputContext(self.model_config)

    @functools.cached_property
    def text_tokens(self) -> tuple[int, ...]:
        """Tokens of text, of which prompts are made."""
        vocab_size = self.model_config.hf_text_config.vocab_size
        return tuple(token for token in range(3, min(vocab_size, 60)) if token not in self.placeholders.values())

    @functools.cached_property
    def bounds(self) -> Mapping[str, int]:
        """Registered bounds of tokens."""
        return MULTIMODAL_REGISTRY.max_tokens_per_item(self.model_config)

    @functools.cached_property
    def limits(self) -> Mapping[str, int]:
        """Items of each modality that a prompt may hold."""
        return MULTIMODAL_REGISTRY.get_mm_limits(self.model_config)

    @functools.cached_property
    def has_room_for_largest(self) -> bool:
        """Whether as many of the largest items as a prompt may hold fit in the model's length."""
        return sum(self.limits[name] * bound for name, bound in self.bounds.items()) <= self.model_config.context_length

    @functools.cached_property
    def dummy(self) -> LLMInputs:
        """The registered dummy data, processed."""
        dummy = INPUT_REGISTRY.dummy_data_for_profiling(self.model_config, self.model_config.context_length)
        return self.process((dummy.prompt_token_ids, dict(dummy.multi_modal_data)))

    def process(self, request: Request) -> LLMInputs:
        """The request through the input processor."""
        tokens, media = request
        return INPUT_REGISTRY.process_input(
            self.model_config, LLMInputs(prompt_token_ids=tokens, multi_modal_data=media)
        )

    def open(self, modality: str, item: Any) -> Any:
        """The item as mappers get it."""
        (opened,) = MULTIMODAL_REGISTRY.open_items(self.model_config, modality, [item])
        return opened

    def map(self, modality: str, opened: Any) -> Arrays:
        """What the mapper makes of an opened item now, whatever is kept of an earlier call."""
        mapped = MULTIMODAL_REGISTRY.mapper(self.model_config, modality)(self.context, (opened,))
        return {name: np.asarray(array) for name, array in mapped.items()}

    def pad(self, arrays: Arrays) -> Arrays:
        """As the encoder gets them."""
        padded = self.model_cls.pad_media(self.hf_config, dict(arrays))
        return {name: np.asarray(array) for name, array in padded.items()}
