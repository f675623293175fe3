"""The work to plan for, and what the model makes of one of its images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.multimodal.context import model_class

__all__ = ["UsualImage", "Workload", "prompt_length", "usual_image"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are all alike.

    Attributes:
      requests: that run at a time on each copy of the model; None takes ``max_num_seqs``.
      prompt_tokens: of text, beside those of the images.
      output_tokens: of an answer.
      images_per_prompt: None takes one where the model takes images.
      image_size: width and height in pixels, before the model's processor.

    Raises:
      ConfigError: a value out of range.
    """

    requests: int | None = None
    prompt_tokens: int = 32
    output_tokens: int = 64
    images_per_prompt: int | None = None
    image_size: tuple[int, int] = (1024, 768)

    def __post_init__(self):
        for name in ("requests", "prompt_tokens", "output_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.images_per_prompt is not None and self.images_per_prompt < 0:
            raise ConfigError(f"images_per_prompt must be at least 0, got {self.images_per_prompt}")
        if min(self.image_size) < 1:
            raise ConfigError(f"image_size must be at least 1x1, got {self.image_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsualImage:
    """Tokens of an image in the prompt, and its padded arrays ``[1, ...]``."""

    tokens: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]


def prompt_length(workload: Workload, image: UsualImage | None) -> int:
    """Tokens of a prompt, those of its images included."""
    return workload.prompt_tokens + (0 if image is None else (workload.images_per_prompt or 0) * image.tokens)


def usual_image(model_config: ModelConfig, size: tuple[int, int]) -> UsualImage | None:
    """What becomes of an image of ``size`` on its way to the model; None where the model takes no images."""
    model_cls: Any = model_class(model_config)
    if "image" not in MULTIMODAL_REGISTRY.modalities(model_cls):
        return None
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(model_config, model_config.context_length, MULTIMODAL_REGISTRY)
    count = len(dummy.multi_modal_data["image"])
    image = Image.new("RGB", size)
    media = {**dummy.multi_modal_data, "image": [image] * count}
    inputs = LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=media)
    processed = INPUT_REGISTRY.process_input(model_config, inputs)
    [item, *_] = processed.multi_modal_data["image"]
    mapped = MULTIMODAL_REGISTRY.map_items(model_config, "image", [item])
    arrays = {name: np.asarray(array) for name, array in mapped.items()}
    padded = model_cls.pad_media(model_config.hf_config, arrays)
    return UsualImage(
        tokens=processed.placeholders["image"][0].length,
        shapes={name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in padded.items()},
    )
