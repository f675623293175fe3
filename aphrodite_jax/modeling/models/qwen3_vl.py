"""Qwen3-VL: Qwen2-VL with features of deeper layers and times as text, over Qwen3 (https://arxiv.org/abs/2511.21631).

How an image becomes tokens: as in Qwen2-VL, with squares of 32 pixels. The tower adds learned positions, a square table
of them that is stretched over the image's lines and columns: each patch has a weighted sum of four. Besides the rows
that the last layer gives, mergers make rows of what a few layers before it give, and a row is all of these side by side
(DeepStack, https://arxiv.org/abs/2406.04334): the first part takes the place of a token's embedding, and the others are
added to the hidden states behind the first, second and third decoder layer. Tokens of text have zeros there.

Layers of a video are set apart by text that tells their time, the mean of their first and last frame's:

    <0.2 seconds><|vision_start|> rows <|vision_end|><1.2 seconds><|vision_start|> rows <|vision_end|>

so that they are like images in the language model. What a chat template sets around ``<|video_pad|>`` stays around all
of it, as in Hugging Face. The frames of a video share one limit of pixels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import ConfigError, MediaError
from aphrodite_jax.inputs import InputContext, text_tokens
from aphrodite_jax.inputs.placeholders import Tokens
from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.models import qwen_vl_inputs
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM
from aphrodite_jax.modeling.models.qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLVisionTower,
    VisionBlock,
    VisionPatchEmbed,
    tower_width,
    vision_norm,
)
from aphrodite_jax.modeling.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from aphrodite_jax.modeling.models.qwen_vl_inputs import PixelLimits, Squares, VideoLimits
from aphrodite_jax.multimodal import Video

__all__ = ["Qwen3VLForConditionalGeneration", "Qwen3VLVisionTower"]

USUAL_FPS = 24.0
"""Frames a second of videos whose times nobody told, as in Hugging Face."""

# Inputs: pure functions of the config and of one request.


def table_places(config, grid: Squares) -> tuple[Int[np.ndarray, "patches 4"], Float[np.ndarray, "patches 4"]]:
    """The four learned positions nearest to each patch, and their weights, square after square.

    The table's first and last lines and columns lie on those of the image. Over 3 columns of patches, columns of a
    table of 4 stand so: 0, 1.5, 3; the middle patch has half of each of two. Hugging Face computes it in float32.
    """
    vision = config.vision_config
    side = _table_side(vision)
    layers, *counts = grid
    axes = []
    for count in (squares * vision.spatial_merge_size for squares in counts):
        places = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
        first = np.floor(places)[:, None]
        both = np.arange(2, dtype=np.float32)[None]
        nearest = np.minimum(first + both, side - 1).astype(np.int32)
        axes.append((nearest, 1 - np.abs(places[:, None] - first - both)))
    (line, line_weight), (column, column_weight) = axes
    places = line[:, None, :, None] * side + column[None, :, None, :]  # [lines, columns, 2, 2]
    weights = line_weight[:, None, :, None] * column_weight[None, :, None, :]
    planes = (plane.reshape(*plane.shape[:2], 4) for plane in (places, weights))
    places, weights = (qwen_vl_inputs.in_squares(plane, vision.spatial_merge_size) for plane in planes)
    return np.tile(places, (layers, 1)), np.tile(weights, (layers, 1))


def _table_side(vision) -> int:
    return int(vision.num_position_embeddings**0.5)


def arrange(config, patches: Float[np.ndarray, "patches pixels"], grid: Squares) -> dict[str, np.ndarray]:
    """What the tower must know of patches.

    Returns:
      As for Qwen2-VL; and ``places`` and ``weights`` as `table_places`.
    """
    places, weights = table_places(config, grid)
    return {**qwen_vl_inputs.arrange(config, patches, grid), "places": places, "weights": weights}


def frame_limits(limits: VideoLimits, num_frames: int) -> PixelLimits:
    """Those of all frames of a video together. Where they are capped, a frame has no more than so many tokens.

    Raises:
      MediaError: the video has one frame.
    """
    if num_frames < limits.layer:
        raise MediaError(f"a video has {limits.layer} frames at least, got {num_frames}: give an image, or more frames")
    most = limits.most
    if limits.is_capped:
        share = min(limits.max_tokens * limits.side**2, most // num_frames)
        most = max(share, int(limits.least * 1.05)) * num_frames
    return PixelLimits(
        side=limits.side,
        least=limits.least,
        most=most,
        num_frames=num_frames,
        counted_frames=round(num_frames / limits.layer) * limits.layer,
        whole_square=True,
    )


def _tokens_of_time(ctx: InputContext, seconds: float) -> tuple[int, ...]:
    return text_tokens(ctx.model_config)(f"<{seconds:.1f} seconds>")


def times_of_layers(video: Video, num_layers: int) -> list[float]:
    """Seconds from the video's start to the middle of each layer; the last frame stands for those that one lacks."""
    times = video.timestamps
    if times is None:
        times = [index / USUAL_FPS for index in range(len(video))]
    of_layer = -(-len(video) // num_layers)
    times = [*times, *[times[-1]] * (num_layers * of_layer - len(video))]
    return [(first + last) / 2 for first, last in zip(times[::of_layer], times[of_layer - 1 :: of_layer], strict=True)]


def video_tokens(ctx: InputContext, grid: Squares, video: Video) -> Tokens:
    """What ``<|video_pad|>`` becomes: for each layer its time, and its rows between two tokens."""
    config = ctx.get_hf_config()
    layers, lines, columns = grid
    rows = (config.vision_start_token_id, *(config.video_token_id,) * (lines * columns), config.vision_end_token_id)
    return [token for time in times_of_layers(video, layers) for token in (*_tokens_of_time(ctx, time), *rows)]


def num_text_tokens(ctx: InputContext, layers: int) -> int:
    """Tokens of a video of so many layers that are text, at most."""
    return layers * (len(_tokens_of_time(ctx, qwen_vl_inputs.LATEST_FRAME)) + 2)


# The model.


class Qwen3VLVisionMLP(nnx.Module):
    """Feed-forward with one hidden layer."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.act = activation(config.hidden_act)
        self.linear_fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.linear_fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The feed-forward of each patch."""
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class Qwen3VLVisionBlock(VisionBlock):
    """Qwen2-VL's with another feed-forward."""

    mlp_class: ClassVar[type] = Qwen3VLVisionMLP


class Qwen3VLPatchMerger(nnx.Module):
    """The patches of each square to a row as wide as the language model; normed one by one, or as a square."""

    def __init__(self, config, *, norms_squares: bool, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.norms_squares, self.width = norms_squares, config.hidden_size * config.spatial_merge_size**2
        self.norm = vision_norm(self.width if norms_squares else config.hidden_size, dtype=dtype, rngs=rngs)
        self.act = activation("gelu")
        self.linear_fc1 = nnx.Linear(self.width, self.width, **kw)
        self.linear_fc2 = nnx.Linear(self.width, config.out_hidden_size, **kw)

    def __call__(self, x: Float[Array, "B T tower"]) -> Float[Array, "B rows D"]:
        """Rows of squares."""
        if not self.norms_squares:
            x = self.norm(x)
        x = x.reshape(len(x), -1, self.width)
        if self.norms_squares:
            x = self.norm(x)
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class Qwen3VLVisionTower(Qwen2VLVisionTower):
    """The vision tower; arrays as `arrange` has them. Its rows are those of several layers side by side."""

    block_class = Qwen3VLVisionBlock

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        if outside := [index for index in config.deepstack_visual_indexes if not 0 <= index < config.depth]:
            raise ConfigError(
                f"vision_config.deepstack_visual_indexes {outside} are not supported: the tower has layers 0 to "
                f"{config.depth - 1}"
            )
        super().__init__(config, dtype=dtype, rngs=rngs)

    def _make_parts(self, config, **kw):
        self.patch_embed = VisionPatchEmbed(config, use_bias=True, **kw)
        self.pos_embed = nnx.Embed(
            config.num_position_embeddings,
            tower_width(config),
            dtype=kw["dtype"],
            param_dtype=kw["dtype"],
            rngs=kw["rngs"],
        )
        self.merger = Qwen3VLPatchMerger(config, norms_squares=False, **kw)
        self.deepstack_merger_list = nnx.List(
            Qwen3VLPatchMerger(config, norms_squares=True, **kw) for _ in config.deepstack_visual_indexes
        )

    @staticmethod
    def out_width(config) -> int:
        """Width of the rows of one layer that the tower makes."""
        return config.out_hidden_size

    def hidden_states(
        self,
        patches: Float[Array, "B T pixels"],
        positions: Int[Array, "B T 2"],
        frames: Int[Array, "B T 2"],
        places: Int[Array, "B T 4"],
        weights: Float[Array, "B T 4"],
    ) -> tuple[Float[Array, "B T tower"], ...]:
        """What goes into each block, and what comes out of the last."""
        table = self.pos_embed.embedding[...].astype(jnp.float32)
        x = self.patch_embed(patches)
        learned = jnp.zeros(x.shape, jnp.float32)
        for i in range(4):
            learned += table[places[..., i]] * weights[..., i, None]
        return self.run_blocks(x + learned.astype(x.dtype), positions, [frames] * self.config.depth)

    def __call__(self, **arrays: Array) -> Float[Array, "B rows width"]:
        """Rows of each item: the last layer's, then those that are added behind decoder layers, in their order."""
        states = self.hidden_states(**arrays)
        indexes = list(self.config.deepstack_visual_indexes)
        deeper = [self.deepstack_merger_list[indexes.index(i)](states[i + 1]) for i in sorted(set(indexes))]
        return jnp.concatenate([self.merger(states[-1]), *deeper], axis=-1)


class Qwen3VLDecoderLayer(Qwen3DecoderLayer):
    """Qwen3's; of what stands beside the hidden states of a row, the first part is added behind it."""

    def __init__(self, config, **kw):
        super().__init__(config, **kw)
        self.width = config.hidden_size

    def __call__(self, x: Float[Array, "T width"], rotary, kv_cache, metadata):
        """Hidden states, and beside them what is for the next layers; and the cache, as `LlamaDecoderLayer`."""
        hidden, own, others = x[:, : self.width], x[:, self.width : 2 * self.width], x[:, 2 * self.width :]
        hidden, kv_cache = super().__call__(hidden, rotary, kv_cache, metadata)
        if own.shape[-1]:
            hidden = jnp.concatenate([hidden + own, others], axis=-1)
        return hidden, kv_cache


class Qwen3VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen3-VL over Qwen3."""

    traits = ("images at their own size and shape", "features of deeper layers of the tower", "times of frames as text")
    layer_class = Qwen3VLDecoderLayer
    tower_class = Qwen3VLVisionTower
    least_frames = 2
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2},
        "max_video_tokens": 768,
    }
    frame_options = frozenset()

    arrange = staticmethod(arrange)
    frame_limits = staticmethod(frame_limits)
    video_tokens = staticmethod(video_tokens)
    num_text_tokens = staticmethod(num_text_tokens)
    attention_biases = staticmethod(Qwen3ForCausalLM.attention_biases)
    layer_masks = staticmethod(LlamaForCausalLM.layer_masks)

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        deeper, layers = len(config.vision_config.deepstack_visual_indexes), config.text_config.num_hidden_layers
        if deeper > layers:
            raise ConfigError(
                f"vision_config.deepstack_visual_indexes of {deeper} layers are not supported: the decoder has {layers}"
            )
        super().__init__(config, dtype=dtype, rngs=rngs)

    @staticmethod
    def adapt_text_config(config):
        """Sections of positions stand by turns, whatever the config says."""
        config.rope_parameters = {**config.rope_parameters, "mrope_interleaved": True}
        return config

    @classmethod
    def mask_specs(cls, config) -> dict[str, MaskSpec]:
        """Causal attention."""
        return LlamaForCausalLM.mask_specs(config.text_config)

    def embed_input_ids(self, input_ids: Int[Array, " T"]) -> Float[Array, "T width"]:
        """Token embeddings, and zeros where rows of media have what is added behind decoder layers."""
        deeper = len(self.config.vision_config.deepstack_visual_indexes) * self.config.text_config.hidden_size
        return jnp.pad(super().embed_input_ids(input_ids), ((0, 0), (0, deeper)))
