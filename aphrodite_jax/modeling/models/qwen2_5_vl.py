"""Qwen2.5-VL: Qwen2-VL with windows in most layers of the tower, and times in seconds (https://arxiv.org/abs/2502.13923).

How an image becomes tokens: as in Qwen2-VL, but that the patches of most layers see no more than a window of the image,
8 x 8 patches of it, and those of a few layers all of it. The mapper hands over squares of patches sorted by window, so
that each window is one run of patches; rows go back to their places behind the merger. Here are windows of 2 x 2
squares of an image of 3 x 5, by the order of their squares:

    0  1 |  4  5 |  8
    2  3 |  6  7 |  9
    ------------------
    10 11| 12 13 | 14

Layers of a video are as far apart in time as its frames are: ``tokens_per_second`` positions for each second.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import InputContext, PlacedItem
from aphrodite_jax.modeling.models import qwen2_vl, qwen_vl_inputs
from aphrodite_jax.modeling.models.llama import LlamaMLP
from aphrodite_jax.modeling.models.qwen2_vl import (
    PatchMerger,
    Qwen2VLForConditionalGeneration,
    Qwen2VLVisionTower,
    VisionBlock,
)
from aphrodite_jax.modeling.models.qwen_vl_inputs import Squares
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, Video
from kernels_pallas.intervals import segments, sort_by_group

__all__ = ["Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLVisionTower"]

USUAL_FPS = 24.0
"""Frames a second of videos whose times nobody told, as in Hugging Face."""

# Inputs: pure functions of the config and of one request.


def window_order(config, grid: Squares) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " n"]]:
    """The order of squares by window, and the bounds of windows in it."""
    side = _window_side(config.vision_config)
    layers, lines, columns = np.indices(grid)
    of_line, of_layer = -(-grid[2] // side), -(-grid[1] // side) * -(-grid[2] // side)
    windows = layers * of_layer + lines // side * of_line + columns // side
    return sort_by_group(windows.reshape(-1))


def _window_side(vision: Any) -> int:
    """Squares along a side of a window."""
    return vision.window_size // vision.spatial_merge_size // vision.patch_size


def arrange(config, patches: Float[np.ndarray, "patches pixels"], grid: Squares) -> dict[str, np.ndarray]:
    """What the tower must know of patches, sorted by window.

    Returns:
      As for Qwen2-VL; ``windows [patches, 2]``, what a patch sees of its window, as ``frames`` of its layer; and
      ``row_order [rows]``: where the row of each square stands among those that are sorted.
    """
    arrays = qwen_vl_inputs.arrange(config, patches, grid)
    order, bounds = window_order(config, grid)
    of_square = config.vision_config.spatial_merge_size**2
    for name in ("patches", "positions"):
        rows = arrays[name]
        arrays[name] = rows.reshape(len(order), of_square, -1)[order].reshape(rows.shape)
    windows = np.stack(segments(bounds * of_square), axis=-1)
    return {**arrays, "windows": windows, "row_order": np.argsort(order).astype(np.int32)}


def map_videos(ctx: InputContext, items: Sequence[Video]) -> MultiModalInputs:
    """As for Qwen2-VL, and ``video_seconds`` that a layer lasts."""
    layer = ctx.get_hf_config().vision_config.temporal_patch_size
    return MultiModalInputs.batch(
        [
            MultiModalInputs({**mapped, "video_seconds": np.float32(layer / (video.fps or USUAL_FPS))})
            for mapped, video in zip(qwen_vl_inputs.map_videos(ctx, items).split(), items, strict=True)
        ]
    )


def time_step(config, item: PlacedItem) -> float:
    """Positions that the layers of an item are apart."""
    seconds = (item.mm_kwargs or {}).get("video_seconds")
    return 1.0 if seconds is None else np.float32(config.vision_config.tokens_per_second) * seconds[0]


# The model.


def rms_norm(width: int, *, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root mean square norm."""
    return nnx.RMSNorm(width, epsilon=qwen2_vl.EPSILON, dtype=dtype, param_dtype=dtype, rngs=rngs)


class GatedMLP(LlamaMLP):
    """Gated feed-forward with biases."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        names = ("hidden_size", "intermediate_size", "hidden_act")
        fields = {name: getattr(config, name) for name in names}
        super().__init__(types.SimpleNamespace(**fields, mlp_bias=True), dtype=dtype, rngs=rngs)


class Qwen2_5_VLVisionBlock(VisionBlock):
    """Qwen2-VL's with other norms and feed-forward."""

    norm: ClassVar[Callable[..., nnx.Module]] = staticmethod(rms_norm)
    mlp_class: ClassVar[type] = GatedMLP


class Qwen2_5_VLPatchMerger(PatchMerger):
    """Qwen2-VL's with another norm."""

    norm: ClassVar[Callable[..., nnx.Module]] = staticmethod(rms_norm)


class Qwen2_5_VLVisionTower(Qwen2VLVisionTower):
    """The vision tower over patches sorted by window; arrays as `arrange` has them."""

    block_class = Qwen2_5_VLVisionBlock
    merger_class = Qwen2_5_VLPatchMerger

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        if not _window_side(config):
            raise ConfigError(
                f"vision_config.window_size {config.window_size} is not supported: a window is as large as a square of "
                f"{config.spatial_merge_size * config.patch_size} pixels at least"
            )
        super().__init__(config, dtype=dtype, rngs=rngs)

    @staticmethod
    def out_width(config) -> int:
        """Width of the rows that the tower makes."""
        return config.out_hidden_size

    def hidden_states(
        self,
        patches: Float[Array, "B T pixels"],
        positions: Int[Array, "B T 2"],
        frames: Int[Array, "B T 2"],
        windows: Int[Array, "B T 2"],
    ) -> tuple[Float[Array, "B T tower"], ...]:
        """What goes into each block, and what comes out of the last, sorted by window as the patches are."""
        full = set(self.config.fullatt_block_indexes)
        intervals = [frames if index in full else windows for index in range(self.config.depth)]
        return self.run_blocks(self.patch_embed(patches), positions, intervals)

    def __call__(self, row_order: Int[Array, "B rows"], **arrays: Array) -> Float[Array, "B rows D"]:
        """Rows of each item, line after line."""
        return jnp.take_along_axis(super().__call__(**arrays), row_order[..., None], axis=1)


@MULTIMODAL_REGISTRY.register_video_input_mapper(map_videos)
class Qwen2_5_VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen2.5-VL over Qwen2."""

    traits = (
        "images at their own size and shape",
        "windows in most layers of the tower",
        "positions of time in seconds",
    )
    tower_class = Qwen2_5_VLVisionTower
    arrange = staticmethod(arrange)
    prompt_positions = staticmethod(functools.partial(qwen_vl_inputs.prompt_positions, time_step=time_step))
