"""Videos: frames in order, mapped by the checkpoint's Hugging Face video processor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError
from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.hf_processors import items_of, video_processor
from aphrodite_jax.multimodal.inputs import MultiModalInputs
from aphrodite_jax.multimodal.media import open_image
from aphrodite_jax.multimodal.plugins.base import MultiModalPlugin, as_array, check_embeddings, is_floating

__all__ = ["VideoPlugin"]


class VideoPlugin(MultiModalPlugin):
    """An item is frames of one size, as a uint8 array or a list of images; or embeddings ``[rows, D]``."""

    modality = "video"

    def split(self, data: Any) -> tuple[Any, ...]:
        """A list of single images is one video; a list of lists, of frame arrays or of embeddings is several."""
        array = as_array(data)
        if array is not None:
            return tuple(array) if array.ndim == (3 if is_floating(array) else 5) else (array,)
        if isinstance(data, list | tuple) and all(map(_is_video, data)):
            return tuple(data)
        return (data,)

    def open(self, item: Any, model_config: ModelConfig) -> np.ndarray:
        """Frames, uint8 ``[frames, height, width, 3]`` upright RGB; or float32 embeddings."""
        array = as_array(item)
        if array is not None and is_floating(array):
            return check_embeddings(array, model_config, self.modality)
        if array is not None and array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and array.size:
            open_image(array[0], model_config)  # the frames' size is checked as an image's
            return array
        if isinstance(item, str | Path | bytes) or not isinstance(item, list | tuple | np.ndarray) or not len(item):
            raise MediaError(
                "a video is a list of images or a uint8 array [frames, height, width, 3]; decode files beforehand"
            )
        frames = [np.asarray(open_image(frame, model_config)) for frame in item]
        if len({frame.shape for frame in frames}) > 1:
            sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames})
            raise MediaError(f"the frames of a video have one size, got {', '.join(sizes)}")
        return np.stack(frames)

    def default_mapper(self, ctx: InputContext, items: Sequence[np.ndarray]) -> MultiModalInputs:
        """``pixel_values_videos``, under the names that the processor gives."""
        features = video_processor(ctx.model_config)(videos=list(items), return_tensors="np")
        return items_of(features, len(items), "the video processor")

    def default_max_tokens(self, ctx: InputContext) -> int:
        """``video_seq_length`` of the config."""
        length = getattr(ctx.get_hf_config(), "video_seq_length", None)
        return length if isinstance(length, int) else super().default_max_tokens(ctx)


def _is_video(data: Any) -> bool:
    array = as_array(data)
    if array is not None:
        return array.ndim == (2 if is_floating(array) else 4)
    return isinstance(data, list | tuple)
