"""InternVL 2.5 and 3: a language model over an image cut into tiles (https://arxiv.org/abs/2412.05271, 2504.10479).

How an image becomes tokens: of all grids of at most ``max_patches`` tiles the one whose sides are most nearly in the
image's proportion is taken, the image is stretched to it and cut; a copy of the whole, squeezed into one more tile,
comes last, unless the grid is one tile. The tower sees each tile by itself; each square of patches becomes one row
(pixel shuffle) and is projected, so that all tiles have the same number of rows. In the prompt stand, for one image,
and for a video, each of whose frames is one tile:

    <img> rows of all tiles </img>
    Frame1: <img> rows </img>\\nFrame2: <img> rows </img>

The tokens round the rows are the tokenizer's; rows of both stand for the token ``<IMG_CONTEXT>``. The name of the first
frame is tokenized apart from the text before it. Hugging Face tokenizes both as one text, which gives the same tokens
behind a line end, where the chat template puts a video.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

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
    dummy_prompt_of,
    expand_items,
    text_tokens,
)
from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache, attend_batch
from aphrodite_jax.modeling.layers.embedding import PatchEmbed
from aphrodite_jax.modeling.layers.norms import layer_norm
from aphrodite_jax.modeling.layers.stack import call_layer, in_parts
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.clip import VisionMLP
from aphrodite_jax.modeling.models.over_language_model import OverLanguageModel
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, Video, embedding_rows
from aphrodite_jax.multimodal.frames import MAX_FRAMES, frames_alone, frames_that_fit, map_frames
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor

__all__ = ["InternVLForConditionalGeneration"]

TILE_COUNTS = (1, 3, 4, 6, 8, 10, 13, 16, 20, 25, 31, 40, 49)
"""Tiles of an image as it is encoded: the next of these, so that at most a fifth of the work is for padding."""
TILES_AT_A_TIME = 8
"""Tiles that go through the tower together; a video is encoded with as many frames as fill whole such parts."""

# Inputs: pure functions of the config and of one request.


def patches_a_side(config) -> int:
    """Patches along a side of a tile.

    Raises:
      ConfigError: tiles or patches that are not square.
    """
    vision = config.vision_config
    for field in ("image_size", "patch_size"):
        if len(set(getattr(vision, field))) != 1:
            raise ConfigError(f"vision_config.{field} {getattr(vision, field)} is not supported: both sides are equal")
    return vision.image_size[0] // vision.patch_size[0]


def shuffle_factor(config) -> int:
    """Side of the square of patches that becomes one row.

    Raises:
      ConfigError: ``downsample_ratio`` is not one over a whole number that divides the patches along a tile's side.
    """
    factor, side = 1 / config.downsample_ratio, patches_a_side(config)
    if not float(factor).is_integer() or side % int(factor):
        raise ConfigError(
            f"downsample_ratio {config.downsample_ratio} is not supported: it must be one over a whole number that "
            f"divides the {side} patches along the side of a tile"
        )
    return int(factor)


def rows_per_tile(config) -> int:
    """Rows that the model makes of one tile."""
    return (patches_a_side(config) // shuffle_factor(config)) ** 2


def tile_processor(ctx: InputContext) -> Any:
    """The checkpoint's image processor, which makes tiles as the tower takes them.

    Raises:
      ConfigError: it is another kind of processor, or its options and the model do not go together.
    """
    config: Any = ctx.get_hf_config(transformers.InternVLConfig)
    processor = image_processor(ctx.model_config)
    if not isinstance(processor, transformers.GotOcr2ImageProcessorPil):
        raise ConfigError(
            f"the image processor {type(processor).__name__} does not cut images into tiles as InternVL wants them; "
            "there is GotOcr2ImageProcessor"
        )
    size: Any = processor.size
    if not processor.do_resize or (size.height, size.width) != tuple(config.vision_config.image_size):
        raise ConfigError(
            f"the image processor makes tiles of {size.height} x {size.width} pixels (do_resize {processor.do_resize}),"
            f" the tower takes {' x '.join(map(str, config.vision_config.image_size))}: they must be the same"
        )
    if processor.max_patches >= TILE_COUNTS[-1]:
        raise ConfigError(f"max_patches {processor.max_patches} is not supported: at most {TILE_COUNTS[-1] - 1} are")
    return processor


def cuts_images(ctx: InputContext) -> bool:
    """Whether images are cut: unless the user says no, whatever the processor's file says, as in Hugging Face."""
    return ctx.model_config.mm_processor_kwargs.get("crop_to_patches", True)


def num_tiles(ctx: InputContext, size: tuple[int, int]) -> int:
    """Tiles of an image of ``size`` (height, width)."""
    return tile_processor(ctx).get_number_of_image_patches(*size, {"crop_to_patches": cuts_images(ctx)})


def size_of_most_tiles(ctx: InputContext) -> tuple[int, int]:
    """An image of the most tiles, (height, width): a line of them."""
    return 1, max(tile_processor(ctx).max_patches, 1)


@OncePerConfig
def media_text(model_config: ModelConfig) -> Callable[[int], tuple[int, ...]]:
    """Number of frames to the tokens of a video of so many, with one image token for each frame's rows; 0: an image."""
    tokens_of = text_tokens(model_config)
    tokenizer = tokens_of.tokenizer
    image_token_id = model_config.hf_config.image_token_id
    start, end = _special_token(tokenizer, "start_image_token"), _special_token(tokenizer, "end_image_token")
    tile = f"{start}{tokenizer.convert_ids_to_tokens(image_token_id)}{end}"

    @functools.cache
    def tokens(frames: int) -> tuple[int, ...]:
        text = "\n".join(f"Frame{index + 1}: {tile}" for index in range(frames)) if frames else tile
        ids = tokens_of(text)
        if ids.count(image_token_id) != max(frames, 1):
            raise ConfigError(
                f"the tokenizer does not keep the token of image_token_id {image_token_id} whole in {tile!r}: it must "
                "be one of its special tokens"
            )
        return ids

    return tokens


@OncePerConfig
def video_token_id(model_config: ModelConfig) -> int:
    """The token that stands for a video in a prompt."""
    tokenizer = text_tokens(model_config).tokenizer
    return tokenizer.convert_tokens_to_ids(_special_token(tokenizer, "video_token"))


def _special_token(tokenizer, name: str) -> str:
    """The text that the tokenizer's files give such a token, or what all published ones give it."""
    usual = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    text = getattr(tokenizer, name, None) or usual[name]
    if text not in tokenizer.get_vocab():
        raise ConfigError(f"the tokenizer has no token {text!r}: name it in tokenizer_config.json as {name!r}")
    return text


def tokens_of_image(ctx: InputContext, tiles: int) -> tuple[int, ...]:
    """All tokens of an image of so many tiles: one for each row, and those round them."""
    return _with_rows(ctx, 0, tiles * rows_per_tile(ctx.model_config.hf_config))


def tokens_of_video(ctx: InputContext, frames: int) -> tuple[int, ...]:
    """All tokens of a video: one for each row, and those round the rows of each frame."""
    return _with_rows(ctx, frames, rows_per_tile(ctx.model_config.hf_config))


def _with_rows(ctx: InputContext, frames: int, rows: int) -> tuple[int, ...]:
    image_token_id = ctx.model_config.hf_config.image_token_id
    tokens = media_text(ctx.model_config)(frames)
    return tuple(token for token in tokens for _ in range(rows if token == image_token_id else 1))


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of an image of the most tiles."""
    return len(tokens_of_image(ctx, num_tiles(ctx, size_of_most_tiles(ctx))))


def max_frames(ctx: InputContext) -> int:
    """Frames of each video of a prompt at its limits, `frames_that_fit`."""
    return frames_that_fit(ctx, max_image_tokens(ctx), lambda frames: len(tokens_of_video(ctx, frames)))


def most_frames(ctx: InputContext) -> int:
    """Frames of a video that is alone in its prompt, `frames_alone`."""
    return frames_alone(ctx, lambda frames: len(tokens_of_video(ctx, frames)))


def max_video_tokens(ctx: InputContext) -> int:
    """Tokens of each video of a prompt at its limits."""
    return len(tokens_of_video(ctx, max_frames(ctx)))


def most_video_tokens(ctx: InputContext) -> int:
    """Tokens of a video that is alone in its prompt, at most."""
    return len(tokens_of_video(ctx, most_frames(ctx)))


def map_images(ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
    """``pixel_values`` of the tiles of each image, the whole last."""
    processor, options = tile_processor(ctx), {"crop_to_patches": cuts_images(ctx), "return_tensors": None}
    tiles = [processor(images=[image], **options)["pixel_values"] for image in items]
    return MultiModalInputs.batch([MultiModalInputs({"pixel_values": _stacked(pixels)}) for pixels in tiles])


def map_videos(ctx: InputContext, items: Sequence[Video]) -> MultiModalInputs:
    """``pixel_values_videos`` of each video, a tile for each frame."""
    pixels = [_stacked(map_frames(ctx, tile_processor(ctx), video, crop_to_patches=False)) for video in items]
    return MultiModalInputs.batch([MultiModalInputs({"pixel_values_videos": frames}) for frames in pixels])


def _stacked(tiles: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(tiles).astype(np.float32)


def pad_media(config, mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An image with as many tiles as `TILE_COUNTS` has next, a video with frames for whole parts."""

    def padded(name: str, array: np.ndarray) -> np.ndarray:
        tiles = array.shape[1]
        if name == "pixel_values":
            more = next(count for count in TILE_COUNTS if count >= tiles) - tiles
        elif name == "pixel_values_videos":
            more = -tiles % TILES_AT_A_TIME
        else:
            return array
        return np.pad(array, [(0, 0), (0, more), *[(0, 0)] * (array.ndim - 2)])

    return {name: padded(name, array) for name, array in mm_kwargs.items()}


def media_shapes(ctx: InputContext) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of an image of each number of tiles, and of a video of each number of whole parts."""
    vision: Any = ctx.get_hf_config(transformers.InternVLConfig).vision_config
    tile = (vision.num_channels, *vision.image_size)
    most = num_tiles(ctx, size_of_most_tiles(ctx))
    images = [count for count, fewer in zip(TILE_COUNTS, (0, *TILE_COUNTS), strict=False) if fewer < most]
    frames = range(TILES_AT_A_TIME, most_frames(ctx) + TILES_AT_A_TIME, TILES_AT_A_TIME)
    return [
        {name: jax.ShapeDtypeStruct((1, count, *tile), np.float32)}
        for name, counts in (("pixel_values", images), ("pixel_values_videos", frames))
        for count in counts
    ]


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many of the largest images and videos as allowed, each behind its placeholder token, then padding."""
    height, width = size_of_most_tiles(ctx)
    images = [Image.new("RGB", (width, height))] * mm_counts["image"]
    videos = [np.zeros((max_frames(ctx), 1, 1, 3), np.uint8)] * mm_counts["video"]
    return dummy_prompt_of(
        seq_len,
        image=(ctx.model_config.hf_config.image_token_id, images, max_image_tokens(ctx)),
        video=(video_token_id(ctx.model_config), videos, max_video_tokens(ctx)),
    )


def expand_media(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<IMG_CONTEXT>`` becomes the tokens of an image, each ``<video>`` those of a video.

    Rows computed beforehand stand as one image, or as frames of as many rows as a tile has.
    """
    image_token_id, rows_of_tile = ctx.model_config.hf_config.image_token_id, rows_per_tile(ctx.model_config.hf_config)

    def image(item) -> tuple[int, ...]:
        if rows := embedding_rows(item):
            return _with_rows(ctx, 0, rows)
        return tokens_of_image(ctx, num_tiles(ctx, (item.height, item.width)))

    def video(item) -> tuple[int, ...]:
        frames, rest = divmod(embedding_rows(item), rows_of_tile)
        if rest:
            raise MediaError(
                f"video embeddings have {rows_of_tile} rows a frame for this model, got {embedding_rows(item)}"
            )
        return tokens_of_video(ctx, frames or len(item))

    media = inputs.multi_modal_data
    images = [image(item) for item in media.get("image", ())]
    videos = [video(item) for item in media.get("video", ())]
    inputs = expand_items(inputs, "image", image_token_id, images)
    return expand_items(inputs, "video", video_token_id(ctx.model_config), videos, row_token=image_token_id)


# The model.


class InternVLVisionAttention(nnx.Module):
    """Self-attention in which every patch of a tile sees every other; the large tower norms queries and keys."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        width, kw = config.hidden_size, {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(width, width, use_bias=config.attention_bias, **kw)
        self.k_proj = nnx.Linear(width, width, use_bias=config.attention_bias, **kw)
        self.v_proj = nnx.Linear(width, width, use_bias=config.attention_bias, **kw)
        self.projection_layer = nnx.Linear(width, width, **kw)
        # Their epsilon is fixed, whatever layer_norm_eps says.
        self.q_norm = nnx.RMSNorm(width, epsilon=1e-6, **kw) if config.use_qk_norm else None
        self.k_norm = nnx.RMSNorm(width, epsilon=1e-6, **kw) if config.use_qk_norm else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Attention within each tile."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.reshape(*x.shape[:2], self.num_heads, -1) for heads in (q, k, v))
        return self.projection_layer(attend_batch(q, k, v).reshape(x.shape))


class InternVLVisionLayer(nnx.Module):
    """Attention and feed-forward, each after a norm, times a learned factor a dimension, added to what came in."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.attention = InternVLVisionAttention(config, **kw)
        self.mlp = VisionMLP(config, **kw)
        self.layernorm_before = _norm(config, **kw)
        self.layernorm_after = _norm(config, **kw)
        scale = jnp.full(config.hidden_size, config.layer_scale_init_value, dtype)
        self.lambda_1, self.lambda_2 = nnx.Param(scale), nnx.Param(scale)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """One layer."""
        x = x + self.lambda_1[...][None, None] * self.attention(self.layernorm_before(x))
        return x + self.lambda_2[...][None, None] * self.mlp(self.layernorm_after(x))


class InternVLVisionEncoder(nnx.Module):
    """A stack of layers that can stop early."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.layer = nnx.List(
            InternVLVisionLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )

    def __call__(self, x: Float[Array, "B T D"], num_layers: int) -> Float[Array, "B T D"]:
        """The output of the first ``num_layers`` layers."""
        for layer in self.layer[:num_layers]:
            x = call_layer(layer, x)
        return x


class InternVLVisionPatchEmbeddings(nnx.Module):
    """Rows of patches."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"use_bias": True, "dtype": dtype, "rngs": rngs}
        self.projection = PatchEmbed(config.num_channels, config.patch_size[0], config.hidden_size, **kw)


class InternVLVisionEmbeddings(nnx.Module):
    """The class token, patches, and learned positions where the config has them."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.config = config
        width, normal = config.hidden_size, nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, width), dtype))
        self.patch_embeddings = InternVLVisionPatchEmbeddings(config, dtype=dtype, rngs=rngs)
        positions = (config.image_size[0] // config.patch_size[0]) ** 2 + 1
        self.position_embeddings = (
            nnx.Param(normal(rngs.params(), (1, positions, width), dtype))
            if config.use_absolute_position_embeddings
            else None
        )

    def __call__(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        """Rows of the tower: the class token, then the patches."""
        expected = (self.config.num_channels, *self.config.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(f"expected tiles of {expected} (channels, height, width), got {pixel_values.shape[1:]}")
        x = self.patch_embeddings.projection(pixel_values)
        first = jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        return x if self.position_embeddings is None else x + self.position_embeddings[...]


class InternVLVisionModel(nnx.Module):
    """InternViT, without its pooler."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.num_layers = config.num_hidden_layers
        kw = {"dtype": dtype, "rngs": rngs}
        self.embeddings = InternVLVisionEmbeddings(config, **kw)
        self.encoder = InternVLVisionEncoder(config, **kw)
        # Means of patches are taken without a norm; the class token would have one.
        self.layernorm = (
            None if config.use_mean_pooling else layer_norm(config.hidden_size, config.layer_norm_eps, **kw)
        )

    def __call__(self, pixel_values: Float[Array, "B C height width"], layer: int) -> Float[Array, "B T D"]:
        """The tower's output where ``layer`` is -1, else the hidden state of that number; the class token comes first.

        0 is the input of the first layer, -2 the output of the last but one.
        """
        x = self.encoder(self.embeddings(pixel_values), layer % (self.num_layers + 1))
        return x if self.layernorm is None or layer != -1 else self.layernorm(x)


class InternVLMultiModalProjector(nnx.Module):
    """Rows of several patches each to rows as wide as the language model."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        fan_in, width = config.vision_config.hidden_size * shuffle_factor(config) ** 2, config.text_config.hidden_size
        kw = {"dtype": dtype, "rngs": rngs}
        self.act = activation(config.projector_hidden_act)
        self.layer_norm = layer_norm(fan_in, 1e-5, **kw)
        self.linear_1 = nnx.Linear(fan_in, width, param_dtype=dtype, **kw)
        self.linear_2 = nnx.Linear(width, width, param_dtype=dtype, **kw)

    def __call__(self, x: Float[Array, "B T patches"]) -> Float[Array, "B T D"]:
        """Each row on its own."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(x))))


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_video_input_mapper(map_videos)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@MULTIMODAL_REGISTRY.register_max_video_tokens(most_video_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_media)
class InternVLForConditionalGeneration(OverLanguageModel):
    """InternVL over Qwen2, Qwen3 or Llama."""

    traits = ("tiles in a grid of the image's proportions", "pixel shuffle", "videos of named frames")
    family = "InternVL"
    language_models: ClassVar[Mapping[str, str]] = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }

    weight_rules = (
        WeightRule(r".*\.rotary_emb\.inv_freq|.*\.position_ids", None),
        WeightRule(r".*\.embeddings\.mask_token", None),  # of the tower's pretraining
        WeightRule(r"(?:model\.)?vision_tower\.(.*)", r"vision_tower.\1"),
        WeightRule(r"(?:model\.)?multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
        WeightRule(r"(language_model\.(?:model|lm_head)\..*)", r"\1"),
        WeightRule(r"model\.language_model\.(.*)", r"language_model.model.\1"),
        WeightRule(r"lm_head\.(.*)", r"language_model.lm_head.\1"),
    )
    video_sampling: ClassVar[Mapping[str, Any]] = {"max_frames": MAX_FRAMES}
    pad_media = staticmethod(pad_media)
    media_shapes = staticmethod(media_shapes)

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        layer, count = config.vision_feature_layer, config.vision_config.num_hidden_layers + 1
        if not isinstance(layer, int) or not -count <= layer < count:
            raise ConfigError(f"vision_feature_layer {layer!r} is not supported: one number in [-{count}, {count}) is")
        if config.vision_feature_select_strategy != "default":
            raise ConfigError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of InternVL is not "
                "supported: squares of patches are put together without the class token, as with 'default'"
            )
        self.config = config
        kw = {"dtype": dtype, "rngs": rngs}
        self.vision_tower = InternVLVisionModel(config.vision_config, **kw)
        self.multi_modal_projector = InternVLMultiModalProjector(config, **kw)
        # Files written before transformers 5 say it in the inner config alone, and the outer one's default is yes.
        tied = config.tie_word_embeddings and config.text_config.tie_word_embeddings
        self.language_model = self.make_language_model(config, tied=tied, **kw)

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return {"image": "<IMG_CONTEXT>", "video": "<video>"}[modality]

    def media_token(self, modality: str) -> int:
        """Images and frames of videos have one token."""
        return self.config.image_token_id

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        pixel_values_videos: Float[Array, "items frames C height width"]
        | Sequence[Float[Array, "frames C height width"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        video_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image and video, tile after tile; items of different shapes come as a sequence of arrays."""
        found: dict[str, Sequence[Float[Array, "rows D"]]] = {}
        for modality, pixels, embeds in (
            ("image", pixel_values, image_embeds),
            ("video", pixel_values_videos, video_embeds),
        ):
            if embeds is not None:
                found[modality] = list(embeds)
            elif isinstance(pixels, Sequence):
                found[modality] = [self._rows(tiles[None])[0] for tiles in pixels]
            else:
                found[modality] = list(self._rows(pixels))
        return {modality: rows for modality, rows in found.items() if rows}

    def _rows(self, pixel_values: Float[Array, "items tiles C height width"]) -> Float[Array, "items rows D"]:
        rows = in_parts(self._rows_of_tiles, pixel_values.reshape(-1, *pixel_values.shape[2:]), TILES_AT_A_TIME)
        return rows.reshape(len(pixel_values), -1, rows.shape[-1])

    def _rows_of_tiles(self, tiles: Float[Array, "B C height width"]) -> Float[Array, "B rows D"]:
        x = self.vision_tower(tiles, self.config.vision_feature_layer)[:, 1:]
        factor, side = shuffle_factor(self.config), patches_a_side(self.config) // shuffle_factor(self.config)
        x = x.reshape(len(x), side, factor, side, factor, -1).swapaxes(2, 3)
        return self.multi_modal_projector(x.reshape(len(x), side**2, -1))

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        pixel_values_videos: Float[Array, "items frames C height width"]
        | Sequence[Float[Array, "frames C height width"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        video_embeds: Float[Array, "items rows D"] | None = None,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches.

        With pixels (or embeddings) their rows replace the ``<IMG_CONTEXT>`` tokens in order; there must be one token
        per row. ``inputs_embeds`` takes the place of both.

        Raises:
          ValueError: images and videos in one call, whose tokens are the same: which comes first can't be told.
        """
        if inputs_embeds is None:
            images = len(pixel_values) or image_embeds is not None
            if images and (len(pixel_values_videos) or video_embeds is not None):
                raise ValueError(
                    "images and videos in one call can't be told apart by their tokens: put their rows "
                    "(embed_multimodal) among the token embeddings and give inputs_embeds"
                )
            media = self.embed_multimodal(pixel_values, pixel_values_videos, image_embeds, video_embeds)
            inputs_embeds = self.embed_with_media(input_ids, media)
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)


def _norm(config, *, dtype, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm_type == "layer_norm":
        return layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    if config.norm_type == "rms_norm":
        return nnx.RMSNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)
    raise ConfigError(f"norm_type {config.norm_type!r} is not supported; there are layer_norm, rms_norm")
