"""Pixtral: a tower that sees images at their own size and shape, and LLaVA over it (https://arxiv.org/abs/2410.07073).

How an image becomes tokens: it is made smaller, and never larger, until it fits the processor's size, and its sides are
stretched to whole patches. The tower tells patches apart by their line and column alone, by which it turns queries and
keys, so that an image may have any number of each. Every patch becomes a row in the place of one ``[IMG]`` token; in
Mistral 3 a square of patches does (`mistral3`). Lines end with a token of text, the last line with another:

    [IMG] [IMG] [IMG] [IMG_BREAK]
    [IMG] [IMG] [IMG] [IMG_END]

The mapper hands over patches with their places, squares of them one after another. So that images without end come down
to a few shapes, `pad_media` puts patches behind them that see nothing and that no patch of the image sees.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError
from aphrodite_jax.inputs import (
    INPUT_REGISTRY,
    DummyData,
    InputContext,
    LLMInputs,
    dummy_prompt,
    expand_items,
    load_tokenizer,
)
from aphrodite_jax.inputs.tokenizer import optional_file
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache, attend_batch
from aphrodite_jax.modeling.layers.embedding import PatchEmbed
from aphrodite_jax.modeling.layers.rotary import RotaryTable, apply_rotary
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.clip import VisionEncoder
from aphrodite_jax.modeling.models.llama import LlamaMLP
from aphrodite_jax.modeling.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProjector,
    feature_layers,
)
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, embedding_rows
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor
from aphrodite_jax.multimodal.shapes import next_step
from kernels_pallas.intervals import RowIntervals

__all__ = ["PixtralForConditionalGeneration", "PixtralVisionModel"]

FEWEST_PATCHES = 64
"""Shapes of fewer are not worth a program."""
EPSILON = 1e-5
"""Of the tower's norms; no config has it."""

# Inputs: pure functions of the config and of one request.


def merge_size(config) -> int:
    """Patches along a side of the square that becomes one row."""
    return getattr(config, "spatial_merge_size", 1)


def row_side(config) -> int:
    """Pixels along a side of the square that becomes one row."""
    return config.vision_config.patch_size * merge_size(config)


def largest_size(ctx: InputContext) -> tuple[int, int]:
    """Height and width in which the checkpoint's image processor makes every image fit.

    Raises:
      ConfigError: it is another kind of processor, or its options and the model do not go together.
    """
    config: Any = ctx.get_hf_config()
    processor = image_processor(ctx.model_config)
    if not isinstance(processor, transformers.PixtralImageProcessorPil):
        raise ConfigError(
            f"the image processor {type(processor).__name__} does not keep the shape of images as Pixtral wants it; "
            "there is PixtralImageProcessor"
        )
    if "patch_size" in ctx.model_config.mm_processor_kwargs:
        raise ConfigError(
            f"mm_processor_kwargs: patch_size can't be chosen: sides are stretched to the model's {row_side(config)}"
        )
    size: Any = processor.size
    height, width = (size.longest_edge,) * 2 if size.longest_edge else (size.height, size.width)
    if not height or not width:
        raise ConfigError(f"size {size} of the image processor has neither 'longest_edge' nor 'height' and 'width'")
    if max(height, width) > (most := config.vision_config.image_size):
        raise ConfigError(
            f"the image processor makes images of up to {height} x {width} pixels, the model's image_size is {most}: "
            f"set mm_processor_kwargs={{'size': {{'longest_edge': {most}}}}}, or raise image_size with hf_overrides"
        )
    return height, width


def grid_of(ctx: InputContext, size: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of the rows of an image of ``size`` (height, width).

    With 16 pixels a row and 1024 at most, an image of 2048 x 1000 becomes one of 1024 x 500: 64 lines, 32 columns.

    Raises:
      MediaError: it is so narrow that nothing is left of it.
    """
    (height, width), (max_height, max_width) = size, largest_size(ctx)
    excess = max(height / max_height, width / max_width)
    if excess > 1:
        height, width = int(height / excess), int(width / excess)  # as Hugging Face rounds
    if not height or not width:
        raise MediaError(
            f"an image of {size[1]} x {size[0]} pixels is too narrow to fit {max_width} x {max_height}: crop it"
        )
    side = row_side(ctx.get_hf_config())
    return -(-height // side), -(-width // side)


@OncePerConfig
def line_ends(model_config: ModelConfig) -> tuple[int, int]:
    """Ids of the tokens behind a line of an image and behind its last one, by their names in the processor's file.

    Raises:
      ConfigError: the tokenizer does not have one of them.
    """
    path = optional_file(model_config.model, "processor_config.json", model_config.revision)
    names = json.loads(path.read_text("utf-8")) if path else {}
    tokenizer: Any = load_tokenizer(model_config)

    def token_id(field: str, usual_name: str) -> int:
        name = names.get(field, usual_name)
        found = tokenizer.convert_tokens_to_ids(name)
        if found is None or tokenizer.convert_ids_to_tokens(found) != name:
            raise ConfigError(f"the tokenizer of {model_config.tokenizer!r} has no token {name!r} ({field})")
        return found

    return token_id("image_break_token", "[IMG_BREAK]"), token_id("image_end_token", "[IMG_END]")


def tokens_of_image(ctx: InputContext, size: tuple[int, int]) -> list[int]:
    """All tokens of an image of ``size`` (height, width): one for each row, and one behind each line."""
    config: Any = ctx.get_hf_config()
    lines, columns = grid_of(ctx, size)
    line_end, image_end = line_ends(ctx.model_config)
    tokens = ([config.image_token_index] * columns + [line_end]) * lines
    return [*tokens[:-1], image_end]


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of the image that takes most of them: one that fills the processor's size."""
    return len(tokens_of_image(ctx, largest_size(ctx)))


def map_images(ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
    """The patches of each image, as `patches_of` has them.

    Raises:
      ConfigError: the image processor gives another size than the model counts on.
    """
    return MultiModalInputs.batch([_map_image(ctx, item) for item in items])


def _map_image(ctx: InputContext, image: Image.Image) -> MultiModalInputs:
    config = ctx.get_hf_config()
    side = row_side(config)
    expected = tuple(count * side for count in grid_of(ctx, (image.height, image.width)))
    processor = image_processor(ctx.model_config)
    features = processor(images=[image], patch_size=side, return_tensors=None)
    pixels = np.asarray(features["pixel_values"][0], np.float32)
    if pixels.shape[1:] != expected:
        raise ConfigError(
            f"the image processor made {pixels.shape[2]} x {pixels.shape[1]} pixels of an image of {image.width} x "
            f"{image.height}, expected {expected[1]} x {expected[0]}: it must resize images and not crop them"
        )
    return MultiModalInputs(patches_of(config, pixels))


def patches_of(config, pixels: Float[np.ndarray, "C height width"]) -> dict[str, np.ndarray]:
    """An image's patches, line after line; of those of one row likewise, and rows line after line.

    Returns:
      ``pixel_values`` flattened ``[patches, C * p * p]``; ``patch_positions``, line and column ``[patches, 2]``; and
      ``kv_stop [patches]``: a patch sees those before that, which is all of the image.
    """
    p, m = config.vision_config.patch_size, merge_size(config)
    C, height, width = pixels.shape
    lines, columns = height // (p * m), width // (p * m)
    patches = pixels.reshape(C, lines, m, p, columns, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    positions = np.indices((lines * m, columns * m), np.int32)
    positions = positions.reshape(2, lines, m, columns, m).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return {
        "pixel_values": patches.reshape(-1, C * p * p),
        "patch_positions": positions,
        "kv_stop": np.full(len(positions), len(positions), np.int32),
    }


def padded_rows(config) -> list[int]:
    """Numbers of rows that images are padded to, ascending: 64, 96, 128, 192 and so on, and the most that one has."""
    square = merge_size(config) ** 2
    most = math.ceil(config.vision_config.image_size / row_side(config)) ** 2
    rows, count = [], next_step(-(-FEWEST_PATCHES // square))
    while count < most:
        rows.append(count)
        count = next_step(count + 1)
    return [*rows, most]


def pad_media(config, mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An image's arrays with zeros behind them, up to one of `padded_rows`: patches that see none and are not seen."""
    patches, square = mm_kwargs["pixel_values"].shape[1], merge_size(config) ** 2
    padding = next(rows * square for rows in padded_rows(config) if rows * square >= patches) - patches
    return {
        name: np.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)) for name, array in mm_kwargs.items()
    }


def media_shapes(ctx: InputContext) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of an image of each of `padded_rows` that the processor's size allows."""
    config: Any = ctx.get_hf_config()
    vision, square = config.vision_config, merge_size(config) ** 2
    most = math.prod(grid_of(ctx, largest_size(ctx)))
    counts = padded_rows(config)
    fitting = [rows for rows, fewer in zip(counts, (0, *counts[:-1]), strict=True) if fewer < most]
    return [
        {
            "pixel_values": jax.ShapeDtypeStruct(
                (1, rows * square, vision.num_channels * vision.patch_size**2), np.float32
            ),
            "patch_positions": jax.ShapeDtypeStruct((1, rows * square, 2), np.int32),
            "kv_stop": jax.ShapeDtypeStruct((1, rows * square), np.int32),
        }
        for rows in fitting
    ]


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many of the largest images as allowed, each behind its placeholder token, then padding to ``seq_len``."""
    config: Any = ctx.get_hf_config()
    height, width = largest_size(ctx)
    images = [Image.new("RGB", (width, height))] * mm_counts["image"]
    return dummy_prompt(seq_len, "image", config.image_token_index, images, max_image_tokens(ctx))


def expand_images(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``[IMG]`` token becomes the tokens of its image.

    Rows computed beforehand do not tell their lines, so they become ``[IMG]`` tokens alone: give an item for each line,
    and write the ends of lines into the prompt.
    """
    config: Any = ctx.get_hf_config()
    images = inputs.multi_modal_data.get("image", ())
    items = [embedding_rows(image) or tokens_of_image(ctx, (image.height, image.width)) for image in images]
    return expand_items(inputs, "image", config.image_token_index, items)


# The model.


def axial_rotary_table(config, positions: Int[Array, "B T 2"]) -> RotaryTable:
    """Angles of patches at ``positions`` (line, column): of the frequencies every other is the line's, from the first.

    Hugging Face's axial kind, equal to ``PixtralVisionRotaryEmbedding``.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = (1.0 / config.rope_parameters["rope_theta"] ** exponents).astype(np.float32)
    axes = (frequencies[0::2], frequencies[1::2])
    places = positions.astype(jnp.float32)
    angles = jnp.concatenate([places[..., i, None] * axis[None, None] for i, axis in enumerate(axes)], axis=-1)
    return RotaryTable(jnp.cos(angles), jnp.sin(angles))


class PixtralAttention(nnx.Module):
    """Self-attention of the patches of an image, with heads turned by line and column."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        width, kw = config.hidden_size, {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(width, width, **kw)
        self.k_proj = nnx.Linear(width, width, **kw)
        self.v_proj = nnx.Linear(width, width, **kw)
        self.o_proj = nnx.Linear(width, width, **kw)

    def __call__(self, x: Float[Array, "B T D"], rotary: RotaryTable, intervals: RowIntervals) -> Float[Array, "B T D"]:
        """Attention within each image."""
        B, T, D = x.shape
        q, k, v = (
            projection(x).reshape(B, T, self.num_heads, -1) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return self.o_proj(attend_batch(q, k, v, intervals).reshape(B, T, D))


class PixtralAttentionLayer(nnx.Module):
    """Attention and a gated feed-forward, each after a norm and added to what came in."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.attention_norm = _norm(config, **kw)
        self.attention = PixtralAttention(config, **kw)
        self.ffn_norm = _norm(config, **kw)
        self.feed_forward = LlamaMLP(config, **kw)

    def __call__(self, x: Float[Array, "B T D"], rotary: RotaryTable, intervals: RowIntervals) -> Float[Array, "B T D"]:
        """One layer; arguments as for `PixtralAttention`."""
        x = x + self.attention(self.attention_norm(x), rotary, intervals)
        return x + self.feed_forward(self.ffn_norm(x))


class PixtralTransformer(VisionEncoder):
    """A stack of layers that can stop early."""

    layer_class = PixtralAttentionLayer


class PixtralVisionModel(nnx.Module):
    """Pixtral's vision tower over the patches of images, an image a row of the batch."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        _check_tower(config)
        self.config = config
        width, kw = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        self.patch_conv = PatchEmbed(config.num_channels, config.patch_size, width, use_bias=False, **kw)
        self.ln_pre = _norm(config, **kw)
        self.transformer = PixtralTransformer(config, **kw)

    def __call__(
        self,
        pixel_values: Float[Array, "B T pixels"],
        patch_positions: Int[Array, "B T 2"],
        kv_stop: Int[Array, "B T"],
        layers: Sequence[int],
    ) -> tuple[Float[Array, "B T D"], ...]:
        """Hidden states of the tower at ``layers``; the arrays are those of `patches_of`."""
        x = self.ln_pre(self.patch_conv.of_patches(pixel_values))
        rotary = axial_rotary_table(self.config, patch_positions)
        return self.transformer(x, layers, rotary, RowIntervals(jnp.zeros_like(kv_stop), kv_stop))


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class PixtralForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA over Pixtral's tower, for Llama, Mistral or Qwen2. Files name its architecture as that of LLaVA-1.5."""

    traits = ("images at their own size and shape", "tower turned by line and column", "tokens at the ends of lines")

    weight_rules = (
        WeightRule(r".*\.patch_positional_embedding\..*", None),
        WeightRule(r"(?:model\.)?vision_tower\.(.*)", r"vision_tower.\1"),
        *LlavaForConditionalGeneration.weight_rules,
    )
    projector_class: Any = LlavaMultiModalProjector
    pad_media = staticmethod(pad_media)
    media_shapes = staticmethod(media_shapes)

    def _make_parts(self, config, **kw):
        _check_config(config)
        self.vision_tower = PixtralVisionModel(config.vision_config, **kw)
        self.multi_modal_projector = self.projector_class(config, **kw)

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return "[IMG]"

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items patches pixels"] | Sequence[Float[Array, "patches pixels"]] = (),
        patch_positions: Int[Array, "items patches 2"] | Sequence[Int[Array, "patches 2"]] = (),
        kv_stop: Int[Array, "items patches"] | Sequence[Int[Array, " patches"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image; images of different numbers of patches come as sequences of arrays."""
        if image_embeds is not None:
            return {"image": list(image_embeds)}
        if isinstance(pixel_values, Sequence):
            items = zip(pixel_values, patch_positions, kv_stop, strict=True)
            return {"image": [self._rows(*(array[None] for array in item))[0] for item in items]}
        return {"image": list(self._rows(pixel_values, patch_positions, kv_stop))}

    def _rows(self, pixel_values, patch_positions, kv_stop) -> Float[Array, "items rows D"]:
        features = self.vision_tower(pixel_values, patch_positions, kv_stop, feature_layers(self.config))
        return self.multi_modal_projector(jnp.concatenate(features, axis=-1))

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        pixel_values: Float[Array, "items patches pixels"] | Sequence[Float[Array, "patches pixels"]] = (),
        patch_positions: Int[Array, "items patches 2"] | Sequence[Int[Array, "patches 2"]] = (),
        kv_stop: Int[Array, "items patches"] | Sequence[Int[Array, " patches"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """As `LlavaForConditionalGeneration`, for the arrays of `patches_of`, which are not padded here."""
        if inputs_embeds is None:
            given = len(pixel_values) or image_embeds is not None
            media = self.embed_multimodal(pixel_values, patch_positions, kv_stop, image_embeds) if given else {}
            inputs_embeds = self.embed_with_media(input_ids, media)
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)


def _norm(config, *, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=EPSILON, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _check_tower(config) -> None:
    for field in ("image_size", "patch_size"):
        if not isinstance(value := getattr(config, field), int):
            raise ConfigError(f"vision_config.{field} {value!r} is not supported: one number is, for both sides")
    if (kind := config.rope_parameters["rope_type"]) != "axial":
        raise ConfigError(f"rope_type {kind!r} of Pixtral's tower is not supported; there is axial")


def _check_config(config) -> None:
    if (kind := config.vision_config.model_type) != "pixtral":
        raise ConfigError(f"a {config.model_type} with a vision tower {kind!r} is not supported; there is pixtral")
    if (strategy := getattr(config, "vision_feature_select_strategy", "full")) != "full":
        raise ConfigError(
            f"vision_feature_select_strategy {strategy!r} over Pixtral's tower is not supported: it drops a class "
            "token, which this tower does not have; there is 'full'"
        )
    count = config.vision_config.num_hidden_layers + 1
    if outside := [layer for layer in feature_layers(config) if not -count <= layer < count]:
        raise ConfigError(f"vision_feature_layer {outside[0]} is outside [-{count}, {count})")
