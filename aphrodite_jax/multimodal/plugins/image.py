"""Images: opened to upright RGB, mapped by the checkpoint's Hugging Face image processor."""

from collections.abc import Sequence
from typing import Any

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import RequestError
from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.hf_processors import image_processor, items_of
from aphrodite_jax.multimodal.inputs import MultiModalInputs, as_array
from aphrodite_jax.multimodal.media import open_image
from aphrodite_jax.multimodal.plugins.base import (
    MultiModalPlugin,
    check_embeddings,
    embedding_rows,
    is_floating,
    is_stack_of_embeddings,
)

__all__ = ["ImagePlugin"]


class ImagePlugin(MultiModalPlugin):
    """An item is anything that `open_image` opens, or floating-point embeddings ``[rows, D]``."""

    modality = "image"

    def split(self, data: Any, model_config: ModelConfig) -> tuple[Any, ...]:
        """As the base; an array ``[items, height, width, C]`` or ``[items, rows, D]`` has its items on axis 0."""
        array = as_array(data)
        if array is None:
            return super().split(data, model_config)
        several = is_stack_of_embeddings(array, model_config) if is_floating(array) else array.ndim == 4
        return tuple(array) if several else (data,)

    def open(self, item: Any, model_config: ModelConfig) -> Any:
        """An upright RGB ``PIL.Image``, or float32 embeddings."""
        array = as_array(item)
        if array is not None and is_floating(array):
            return check_embeddings(array, model_config, self.modality, "an image is a uint8 array")
        return open_image(item, model_config)

    def default_mapper(self, ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
        """``pixel_values`` (and what else the processor gives), or ``image_embeds`` for embeddings."""
        embedded = [bool(embedding_rows(item)) for item in items]
        if all(embedded):
            return MultiModalInputs.batch([MultiModalInputs({"image_embeds": item}) for item in items])
        if any(embedded):
            raise RequestError("pixels and embeddings can't be mapped together: map them one by one")
        features = image_processor(ctx.model_config)(images=list(items), return_tensors=None)
        return items_of(features, len(items), "the image processor")

    def default_max_tokens(self, ctx: InputContext) -> int:
        """The patches of the vision tower and a class token; ``image_seq_length`` where the config has no such tower.

        The tower goes first, since Hugging Face's configs have an ``image_seq_length`` even where nobody set it.
        """
        config = ctx.get_hf_config()
        vision = getattr(config, "vision_config", None)
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if isinstance(size, int) and isinstance(patch, int):
            return (size // patch) ** 2 + 1
        length = getattr(config, "image_seq_length", None)
        return length if isinstance(length, int) else super().default_max_tokens(ctx)
