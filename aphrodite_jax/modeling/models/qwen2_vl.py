"""Qwen2-VL: images and videos at their own size, and positions on three axes (https://arxiv.org/abs/2409.12191).

How an image becomes tokens: its sides are resized to whole squares of 28 pixels, with as many pixels as the processor's
limits allow. A square is four patches, 2 x 2. The tower tells patches apart by their line and column, by which it turns
queries and keys; the merger makes one row of the four patches of a square. Rows stand line after line, one for each
``<|image_pad|>`` token. A video is frames of one size, two of them a layer: a patch reaches over both, and sees the
patches of its own layer. An image is one layer of the same frame twice.

In the language model, text and rows have a position on each of three axes. Here are five tokens of text, and between
them a video of two layers of 1 x 3 squares:

    time      0  1  2 2 2 3 3 3  5  6  7
    line      0  1  2 2 2 2 2 2  5  6  7
    column    0  1  2 3 4 2 3 4  5  6  7

The functions of inputs are in `qwen_vl_inputs`, for all three models of the family: Qwen2.5-VL (`qwen2_5_vl`) and
Qwen3-VL (`qwen3_vl`) have other towers, decoders and some functions of inputs of their own.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import (
    INPUT_REGISTRY,
    InputContext,
)
from aphrodite_jax.inputs.placeholders import Tokens
from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache, attend_batch
from aphrodite_jax.modeling.layers.embedding import PatchEmbed
from aphrodite_jax.modeling.layers.norms import layer_norm
from aphrodite_jax.modeling.layers.rotary import RotaryTable, apply_rotary
from aphrodite_jax.modeling.layers.stack import call_layer
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.interfaces import MaskSpec, SupportsMRoPE, SupportsMultiModal
from aphrodite_jax.modeling.models.qwen2 import Qwen2ForCausalLM
from aphrodite_jax.modeling.models.qwen_vl_inputs import (
    Squares,
    arrange,
    dummy_data,
    expand_media,
    frame_limits,
    map_images,
    map_videos,
    max_image_tokens,
    max_video_tokens,
    media_shapes,
    pad_media,
    prompt_positions,
)
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, Video
from kernels_pallas.intervals import RowIntervals

__all__ = [
    "FlatPatchEmbed",
    "PatchMerger",
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLVisionTower",
    "VisionAttention",
    "VisionBlock",
    "VisionMLP",
    "VisionPatchEmbed",
    "axial_rotary_table",
    "tower_width",
    "vision_norm",
]

EPSILON = 1e-6
"""Of the tower's norms; no config has it."""


def axial_rotary_table(config, positions: Int[Array, "B T 2"]) -> RotaryTable:
    """Angles of patches at ``positions`` (line, column): the first half of the pairs turn by the line, the others by
    the column, with the same frequencies."""
    pairs = tower_width(config) // config.num_heads // 4
    frequencies = config.rope_parameters["rope_theta"] ** (-np.arange(pairs, dtype=np.float32) / np.float32(pairs))
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None, None]
    angles = angles.reshape(*positions.shape[:-1], 2 * pairs)
    return RotaryTable(jnp.cos(angles), jnp.sin(angles))


def tower_width(vision: Any) -> int:
    """Width of the tower's hidden states; Qwen2-VL's ``hidden_size`` is that of the rows that it makes."""
    return getattr(vision, "embed_dim", None) or vision.hidden_size


class FlatPatchEmbed(PatchEmbed):
    """A convolution over patches that are cut out and flattened already; checkpoints store ``(D, C, layer, p, p)``."""

    def __init__(self, vision, *, use_bias: bool, dtype, rngs: nnx.Rngs):
        layer, p, width = vision.temporal_patch_size, vision.patch_size, tower_width(vision)
        super().__init__(vision.in_channels * layer, p, width, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.conv_shape = (width, vision.in_channels, layer, p, p)

    def __call__(self, patches: Float[Array, "B T pixels"]) -> Float[Array, "B T D"]:
        """Rows of patches."""
        return self.of_patches(patches)


class VisionPatchEmbed(nnx.Module):
    """Patches to hidden states."""

    def __init__(self, vision, *, use_bias: bool, dtype, rngs: nnx.Rngs):
        self.proj = FlatPatchEmbed(vision, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "B T pixels"]) -> Float[Array, "B T D"]:
        """As `FlatPatchEmbed`."""
        return self.proj(patches)


class VisionAttention(nnx.Module):
    """Self-attention of patches, with heads turned by line and column, within the intervals that are given."""

    joined: ClassVar[Mapping[str, Sequence[str]]] = {"qkv": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        width, kw = tower_width(config), {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(width, width, **kw)
        self.k_proj = nnx.Linear(width, width, **kw)
        self.v_proj = nnx.Linear(width, width, **kw)
        self.proj = nnx.Linear(width, width, **kw)

    def __call__(self, x: Float[Array, "B T D"], rotary: RotaryTable, intervals: RowIntervals) -> Float[Array, "B T D"]:
        """Attention of each item's patches."""
        B, T, D = x.shape
        q, k, v = (
            projection(x).reshape(B, T, self.num_heads, -1) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return self.proj(attend_batch(q, k, v, intervals).reshape(B, T, D))


class VisionMLP(nnx.Module):
    """Feed-forward with one hidden layer."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        width, kw = tower_width(config), {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        inner = int(width * config.mlp_ratio)
        self.act = activation(config.hidden_act)
        self.fc1 = nnx.Linear(width, inner, **kw)
        self.fc2 = nnx.Linear(inner, width, **kw)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The feed-forward of each patch."""
        return self.fc2(self.act(self.fc1(x)))


def vision_norm(width: int, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm of the tower."""
    return layer_norm(width, EPSILON, dtype=dtype, rngs=rngs)


class VisionBlock(nnx.Module):
    """Attention and feed-forward, each after a norm and added to what came in."""

    norm: ClassVar[Callable[..., nnx.Module]] = staticmethod(vision_norm)
    mlp_class: ClassVar[type] = VisionMLP

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm1 = self.norm(tower_width(config), **kw)
        self.norm2 = self.norm(tower_width(config), **kw)
        self.attn = VisionAttention(config, **kw)
        self.mlp = self.mlp_class(config, **kw)

    def __call__(self, x: Float[Array, "B T D"], rotary: RotaryTable, intervals: RowIntervals) -> Float[Array, "B T D"]:
        """One layer; arguments as for `VisionAttention`."""
        x = x + self.attn(self.norm1(x), rotary, intervals)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """The patches of each square to a row as wide as the language model."""

    norm: ClassVar[Callable[..., nnx.Module]] = staticmethod(vision_norm)

    def __init__(self, config, out_width: int, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.width = tower_width(config) * config.spatial_merge_size**2
        self.ln_q = self.norm(tower_width(config), dtype=dtype, rngs=rngs)
        first, second = nnx.Linear(self.width, self.width, **kw), nnx.Linear(self.width, out_width, **kw)
        self.mlp = nnx.List([first, activation("gelu"), second])  # numbered as in checkpoints

    def __call__(self, x: Float[Array, "B T tower"]) -> Float[Array, "B rows D"]:
        """Rows of squares."""
        x = self.ln_q(x).reshape(len(x), -1, self.width)
        for part in self.mlp:
            x = part(x)
        return x


class Qwen2VLVisionTower(nnx.Module):
    """The vision tower over patches of images or videos, an item a row of the batch; arrays as `arrange` has them."""

    block_class: ClassVar[type[VisionBlock]] = VisionBlock
    merger_class: ClassVar[type[PatchMerger]] = PatchMerger

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        _check_tower(config)
        self.config = config
        kw = {"dtype": dtype, "rngs": rngs}
        self._make_parts(config, **kw)
        self.blocks = nnx.List(self.block_class(config, **kw) for _ in range(config.depth))

    def _make_parts(self, config, **kw):
        self.patch_embed = VisionPatchEmbed(config, use_bias=False, **kw)
        self.merger = self.merger_class(config, self.out_width(config), **kw)

    @staticmethod
    def out_width(config) -> int:
        """Width of the rows that the tower makes."""
        return config.hidden_size

    def hidden_states(
        self,
        patches: Float[Array, "B T pixels"],
        positions: Int[Array, "B T 2"],
        frames: Int[Array, "B T 2"],
    ) -> tuple[Float[Array, "B T tower"], ...]:
        """What goes into each block, and what comes out of the last."""
        return self.run_blocks(self.patch_embed(patches), positions, [frames] * self.config.depth)

    def run_blocks(
        self,
        x: Float[Array, "B T tower"],
        positions: Int[Array, "B T 2"],
        intervals: Sequence[Int[Array, "B T 2"]],
    ) -> tuple[Float[Array, "B T tower"], ...]:
        """As `hidden_states`, from embedded patches, with the intervals of each block."""
        rotary = axial_rotary_table(self.config, positions)
        states = [x]
        for block, bounds in zip(self.blocks, intervals, strict=True):
            states.append(call_layer(block, states[-1], rotary, RowIntervals(bounds[..., 0], bounds[..., 1])))
        return tuple(states)

    def __call__(self, **arrays: Array) -> Float[Array, "B rows D"]:
        """Rows of each item, from the arrays of ``arrange``."""
        return self.merger(self.hidden_states(**arrays)[-1])


def _check_tower(config) -> None:
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(value := getattr(config, name), int):
            raise ConfigError(f"vision_config.{name} {value!r} is not supported: one number is, for all sides")
    if config.in_channels != 3:
        raise ConfigError(f"vision_config.in_channels {config.in_channels} is not supported: images have 3")
    if (kind := config.rope_parameters["rope_type"]) != "axial":
        raise ConfigError(f"vision_config: rope_type {kind!r} is not supported; there is axial")
    if tower_width(config) % (4 * config.num_heads):
        raise ConfigError(
            f"vision_config: a width of {tower_width(config)} in {config.num_heads} heads is not supported: a head's "
            "must be divisible by 4, for pairs of lines and columns"
        )


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_video_input_mapper(map_videos)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@MULTIMODAL_REGISTRY.register_max_video_tokens(max_video_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_media)
class Qwen2VLForConditionalGeneration(Qwen2ForCausalLM, SupportsMultiModal, SupportsMRoPE):
    """Qwen2-VL over Qwen2.

    Class attributes:
      tower_class: of the vision tower.
      least_frames: of a video.
      video_defaults: options of the video processor where its files do not have them.
      frame_options: options of ``mm_processor_kwargs`` that limit frames as well as images.
    """

    traits = ("images at their own size and shape", "positions on three axes", "squares of patches merged")

    # The tree has the names of most files on the hub.
    weight_rules = (
        WeightRule(r".*\.rotary(?:_pos)?_emb\.inv_freq", None),
        WeightRule(r"(?:model\.)?visual\.(.*)", r"visual.\1"),
        WeightRule(r"model\.language_model\.(.*)", r"model.\1"),
        WeightRule(r"((?:model|lm_head)\..*)", r"\1"),
    )
    pad_media = staticmethod(pad_media)
    media_shapes = staticmethod(media_shapes)
    prompt_positions = staticmethod(prompt_positions)

    tower_class: ClassVar[type] = Qwen2VLVisionTower
    least_frames: ClassVar[int] = 1
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2},
        "max_video_tokens": 128_000,
    }
    frame_options: ClassVar[frozenset[str]] = frozenset({"size", "min_pixels", "max_pixels"})

    arrange = staticmethod(arrange)
    frame_limits = staticmethod(frame_limits)

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        out_width = self.tower_class.out_width(config.vision_config)
        if out_width != config.text_config.hidden_size:
            raise ConfigError(
                f"the vision tower makes rows {out_width} wide, the language model's hidden_size is "
                f"{config.text_config.hidden_size}: they must be equal"
            )
        text_config = copy.deepcopy(config.text_config)
        text_config.tie_word_embeddings = config.tie_word_embeddings  # the outer one decides, as in Hugging Face
        super().__init__(self.adapt_text_config(text_config), dtype=dtype, rngs=rngs)
        self.config = config
        self.visual = self.tower_class(config.vision_config, dtype=dtype, rngs=rngs)

    @staticmethod
    def adapt_text_config(config):
        """What the language model takes for its config."""
        return config

    @staticmethod
    def video_tokens(ctx: InputContext, grid: Squares, video: Video) -> Tokens:
        """What ``<|video_pad|>`` becomes."""
        return math.prod(grid)

    @staticmethod
    def num_text_tokens(ctx: InputContext, layers: int) -> int:
        """Tokens of a video of so many layers that are text, at most."""
        return 0

    @classmethod
    def mask_specs(cls, config) -> dict[str, MaskSpec]:
        """Those of the language model: rows of media are plain tokens to it."""
        return super().mask_specs(config.text_config)

    @classmethod
    def kv_cache_shapes(cls, config) -> tuple[tuple[int, int], ...]:
        """Those of the language model."""
        return super().kv_cache_shapes(config.text_config)

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"

    def embed_multimodal(self, **mm_kwargs: Array | Sequence[Array]) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image and video, from the arrays of the mappers.

        Items of one shape are encoded together; items of different shapes come as sequences of arrays.
        """
        by_modality: dict[str, dict[str, Any]] = {}
        for name, arrays in mm_kwargs.items():
            modality, _, name = name.partition("_")
            by_modality.setdefault(modality, {})[name] = arrays
        return {modality: self._rows(arrays) for modality, arrays in by_modality.items()}

    def _rows(self, arrays: Mapping[str, Any]) -> list[Float[Array, "rows D"]]:
        arrays = {name: array for name, array in arrays.items() if name not in ("grid", "seconds")}
        if isinstance(arrays["patches"], Sequence):
            items = range(len(arrays["patches"]))
            return [self._rows({name: array[i][None] for name, array in arrays.items()})[0] for i in items]
        return list(self.visual(**arrays))

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, "3 T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
        **mm_kwargs: Array | Sequence[Array],
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches.

        With the arrays of the mappers, rows of images and videos replace their tokens in order; there must be one token
        per row. ``inputs_embeds`` takes the place of both.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_with_media(input_ids, self.embed_multimodal(**mm_kwargs))
        return self.model(inputs_embeds, positions, kv_caches, attn_metadata)
