"""Videos: frames in order, mapped by the checkpoint's Hugging Face video processor."""

import mimetypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.hf_processors import items_of, video_processor
from aphrodite_jax.multimodal.inputs import MultiModalInputs, as_array
from aphrodite_jax.multimodal.media import is_image_file
from aphrodite_jax.multimodal.plugins.base import (
    MultiModalPlugin,
    check_embeddings,
    is_floating,
    is_stack_of_embeddings,
)
from aphrodite_jax.multimodal.video import Video, open_video

__all__ = ["VideoPlugin"]


class VideoPlugin(MultiModalPlugin):
    """An item is anything that `open_video` opens, or floating-point embeddings ``[rows, D]``."""

    modality = "video"

    def split(self, data: Any, model_config: ModelConfig) -> tuple[Any, ...]:
        """A list of single images is one video; of lists, frame arrays, mappings, video files or embeddings several.

        A file is an image where its name, or the header of its bytes, says so, and else a video.
        """
        array = as_array(data)
        if array is not None:
            several = is_stack_of_embeddings(array, model_config) if is_floating(array) else array.ndim == 5
            return tuple(array) if several else (array,)
        if isinstance(data, list | tuple) and data and all(map(_is_video, data)):
            return tuple(data)
        return (data,)

    def open(self, item: Any, model_config: ModelConfig) -> Video | np.ndarray:
        """A `Video`, or float32 embeddings."""
        array = as_array(item)
        if array is not None and is_floating(array):
            return check_embeddings(array, model_config, self.modality, "a video's frames are a uint8 array")
        return open_video(item, model_config)

    def default_mapper(self, ctx: InputContext, items: Sequence[Video]) -> MultiModalInputs:
        """``pixel_values_videos``, under the names that the processor gives."""
        features = video_processor(ctx.model_config)(videos=[video.frames for video in items], return_tensors="np")
        return items_of(features, len(items), "the video processor")

    def default_max_tokens(self, ctx: InputContext) -> int:
        """``video_seq_length`` of the config."""
        length = getattr(ctx.get_hf_config(), "video_seq_length", None)
        return length if isinstance(length, int) else super().default_max_tokens(ctx)


def _is_video(data: Any) -> bool:
    array = as_array(data)
    if array is not None:
        return array.ndim == (2 if is_floating(array) else 4)
    if isinstance(data, str | Path):
        return not _names_an_image(str(data))
    if isinstance(data, bytes | bytearray | memoryview):
        return not is_image_file(data)
    return isinstance(data, list | tuple | Mapping | Video)


def _names_an_image(name: str) -> bool:
    if (mimetypes.guess_type(name)[0] or "").startswith("image/"):  # which reads data: URLs too
        return True
    suffix = os.path.splitext(name)[1].lower()
    return Image.registered_extensions().get(suffix, "MPEG") != "MPEG"
