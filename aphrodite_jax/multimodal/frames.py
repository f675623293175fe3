"""Videos as pictures: frames that an image processor maps one by one."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from aphrodite_jax.errors import MediaError
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.video import Video, video_processor_options

__all__ = ["MAX_FRAMES", "frames_alone", "frames_that_fit", "map_frames"]

MAX_FRAMES = 32
"""Frames of one video at most, of which all shapes are compiled ahead; these models were trained on no more."""


def frames_that_fit(ctx: InputContext, image_tokens: int, video_tokens: Callable[[int], int]) -> int:
    """Frames of a video that fits in a prompt at its limits, beside images of so many tokens each; one at least."""
    limits = MULTIMODAL_REGISTRY.get_mm_limits(ctx.model_config)
    room = (ctx.model_config.context_length - limits["image"] * image_tokens) // limits["video"]
    return _most_frames(room, video_tokens)


def frames_alone(ctx: InputContext, video_tokens: Callable[[int], int]) -> int:
    """Frames of a video that fits in a prompt with nothing beside it; one at least."""
    return _most_frames(ctx.model_config.context_length, video_tokens)


def _most_frames(room: int, video_tokens: Callable[[int], int]) -> int:
    return next((frames for frames in range(MAX_FRAMES, 1, -1) if video_tokens(frames) <= room), 1)


def map_frames(ctx: InputContext, processor: Any, video: Video, **options) -> list[np.ndarray]:
    """What the image processor, with the options of the checkpoint's video processor, makes of each frame.

    Raises:
      MediaError: the video has more frames than `MAX_FRAMES`.
    """
    if len(video) > MAX_FRAMES:
        raise MediaError(
            f"the video has {len(video)} frames, at most {MAX_FRAMES} are taken: give fewer, or, of a file, set "
            f'video_sampling={{"num_frames": {MAX_FRAMES}}}'
        )
    names = {"size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
    names -= set(ctx.model_config.mm_processor_kwargs)  # which the processor has already
    found = video_processor_options(ctx.model_config)
    options |= {name: found[name] for name in names if found.get(name) is not None}
    # As pictures, whose channels the processor need not guess from the shape.
    return processor(images=list(map(Image.fromarray, video.frames)), return_tensors=None, **options)["pixel_values"]
