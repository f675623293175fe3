"""Idefics3 and SmolVLM: Llama over an image cut into tiles (https://arxiv.org/abs/2408.12637, 2504.05299).

How an image becomes tokens: its longer side is resized to a fixed length, both sides are stretched to whole tiles, and
it is cut; a copy of the whole, squeezed into one more tile, comes last. The tower and the connector see each tile by
itself. The connector puts each square of patches into one row (pixel shuffle) and projects it, so that all tiles have
the same number of rows. In the prompt the rows of a tile stand behind its name:

    <fake_token_around_image><row_1_col_1> rows <fake_token_around_image><row_1_col_2> rows \\n
    <fake_token_around_image><row_2_col_1> rows <fake_token_around_image><row_2_col_2> rows \\n\\n
    <fake_token_around_image><global-img> rows <fake_token_around_image>

An image that is not cut has the last line alone. These names, and how line ends become tokens, are the tokenizer's.
The two models differ in nothing but the names of their configs and processors. SmolVLM's videos are not supported.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
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
    text_tokens,
)
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.clip import VisionEncoder, vision_norm
from aphrodite_jax.modeling.models.over_language_model import OverLanguageModel
from aphrodite_jax.modeling.models.siglip import SiglipVisionEmbeddings
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, embedding_rows
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor
from aphrodite_jax.multimodal.plugins.image import ImagePlugin

__all__ = ["Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"]

MAX_TILES_A_SIDE = 6
"""Tokenizers of these models have names for so many rows and columns."""
LONGEST_EDGE_OF_ALL = 4096
"""Pixels above which Hugging Face's processor resizes no image, whatever its ``size`` says."""

# Inputs: pure functions of the config and of one request.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the checkpoint's image processor cuts images.

    Attributes:
      longest_edge: pixels of the longer side of an image before it is stretched to whole tiles.
      tile_size: pixels of a tile's side.
      rows: of a tile, as the connector gives them.
      splits: whether images are cut at all; if not, each is squeezed into one tile.
    """

    longest_edge: int
    tile_size: int
    rows: int
    splits: bool


def tiling(ctx: InputContext) -> Tiling:
    """How images are cut for this checkpoint, from its image processor and the model's config.

    Raises:
      ConfigError: it is another kind of processor, or its options and the model do not go together.
    """
    config: Any = ctx.get_hf_config()
    processor = image_processor(ctx.model_config)
    kinds = (transformers.Idefics3ImageProcessorPil, transformers.SmolVLMImageProcessorPil)
    if not isinstance(processor, kinds):
        raise ConfigError(
            f"the image processor {type(processor).__name__} does not cut images into tiles as Idefics3 wants them; "
            f"there are {', '.join(kind.__name__.removesuffix('Pil') for kind in kinds)}"
        )
    size: Any = processor.size
    of_tiles = processor.max_image_size
    if not isinstance(of_tiles, Mapping) or "longest_edge" not in of_tiles:
        raise ConfigError(f"max_image_size {of_tiles!r} is not supported: it must be {{'longest_edge': pixels}}")
    longest_edge, tile_size = size.longest_edge, of_tiles["longest_edge"]
    side, factor = tile_size // config.vision_config.patch_size, config.scale_factor
    if not side or side % factor:
        raise ConfigError(
            f"a tile of {tile_size} pixels (max_image_size) is {side} patches wide, the model's scale_factor {factor} "
            "must divide them"
        )
    found = Tiling(
        longest_edge=longest_edge or tile_size,
        tile_size=tile_size,
        rows=(side // factor) ** 2,
        splits=bool(processor.do_image_splitting),
    )
    if found.splits and not (processor.do_resize and longest_edge):
        raise ConfigError(
            f"do_resize {processor.do_resize} with size {size} is not supported: where images are split, "
            "they are first resized to a longest_edge, else the tokens of one have no bound"
        )
    if (most := max(grid_of(found, (1, 1)))) > MAX_TILES_A_SIDE:
        raise ConfigError(
            f"size {longest_edge} and max_image_size {tile_size} cut an image into {most} x {most} tiles; at most "
            f"{MAX_TILES_A_SIDE} a side have names"
        )
    return found


def grid_of(tiles: Tiling, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tiles that an image of ``size`` (height, width) is cut into; (0, 0) if it is not cut.

    Raises:
      MediaError: it is so narrow that nothing is left of it.
    """
    if not tiles.splits:
        return 0, 0
    height, width = _with_longest_edge(size, tiles.longest_edge)
    # The shorter side becomes even, and the longer one stays odd where it is.
    height, width = (height + height % 2, width) if size[1] >= size[0] else (height, width + width % 2)
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > LONGEST_EDGE_OF_ALL:
        height, width = (max(side, 1) for side in _with_longest_edge((height, width), LONGEST_EDGE_OF_ALL))
    whole_tiles = -(-max(height, width) // tiles.tile_size) * tiles.tile_size
    height, width = _with_longest_edge((height, width), whole_tiles)
    rows, columns = -(-height // tiles.tile_size), -(-width // tiles.tile_size)
    if not rows or not columns:
        raise MediaError(
            f"an image of {size[1]} x {size[0]} pixels is too narrow to be cut into tiles of {tiles.tile_size}: crop it"
        )
    return (rows, columns) if rows * columns > 1 else (0, 0)


def _with_longest_edge(size: tuple[int, int], longest_edge: int) -> tuple[int, int]:
    """An image's size scaled to that longer side, the other rounded down, in Hugging Face's order of operations."""
    height, width = size
    aspect_ratio = width / height
    if width >= height:
        return int(longest_edge / aspect_ratio), longest_edge
    return longest_edge, int(longest_edge * aspect_ratio)


def text_of_tiles(grid: tuple[int, int], image_token: str) -> str:
    """What stands for an image of so many rows and columns of tiles, with one ``image_token`` for each tile's rows."""
    around = "<fake_token_around_image>"
    rows, columns = grid
    lines = [
        "".join(f"{around}<row_{row}_col_{column}>{image_token}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    return "".join([*lines, "\n" if lines else "", f"{around}<global-img>{image_token}{around}"])


@OncePerConfig
def tile_tokens(model_config: ModelConfig) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    """Grid to the token ids of its `text_of_tiles`, each tokenized once."""
    tokens_of = text_tokens(model_config)
    image_token_id = model_config.hf_config.image_token_id
    image_token = str(tokens_of.tokenizer.convert_ids_to_tokens(image_token_id))

    @functools.cache
    def tokens(grid: tuple[int, int]) -> tuple[int, ...]:
        ids = tokens_of(text_of_tiles(grid, image_token))
        tiles = 1 + grid[0] * grid[1]
        if ids.count(image_token_id) != tiles:
            raise ConfigError(
                f"the tokenizer does not keep {image_token!r}, the token of image_token_id {image_token_id}, whole in "
                "a text: it must be one of its special tokens"
            )
        return ids

    return tokens


def tokens_of_image(ctx: InputContext, size: tuple[int, int]) -> tuple[int, ...]:
    """All tokens of an image of ``size`` (height, width): one for each row, and its tiles' names."""
    tiles = tiling(ctx)
    return _with_rows(ctx, tile_tokens(ctx.model_config)(grid_of(tiles, size)), tiles.rows)


def _with_rows(ctx: InputContext, tokens: Sequence[int], rows: int) -> tuple[int, ...]:
    """The tokens with the image token so often for each time that it stands there."""
    image_token_id = ctx.model_config.hf_config.image_token_id
    return tuple(token for token in tokens for _ in range(rows if token == image_token_id else 1))


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of the image that takes most of them: a square one."""
    return len(tokens_of_image(ctx, (1, 1)))


def map_images(ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
    """``pixel_values`` of the tiles of each image, the whole last.

    The processor's ``pixel_attention_mask`` says nothing here: a tile is full, and an image mapped by itself has none
    that fill up a batch.
    """
    pixels = [ImagePlugin().default_mapper(ctx, [item])["pixel_values"][0] for item in items]
    return MultiModalInputs.batch([MultiModalInputs({"pixel_values": tiles}) for tiles in pixels])


def media_shapes(ctx: InputContext) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of an image of each number of tiles: one, or as many rows or columns as a side has, and the whole."""
    tiles, channels = tiling(ctx), ctx.model_config.hf_config.vision_config.num_channels
    most, _ = grid_of(tiles, (1, 1))
    counts = [1, *(1 + most * others for others in range(1, most + 1))]
    shape = (channels, tiles.tile_size, tiles.tile_size)
    return [{"pixel_values": jax.ShapeDtypeStruct((1, count, *shape), np.float32)} for count in counts]


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many square images as allowed, each behind its placeholder token, then padding up to ``seq_len`` tokens."""
    side = tiling(ctx).longest_edge
    images = [Image.new("RGB", (side, side))] * mm_counts["image"]
    return dummy_prompt(seq_len, "image", ctx.model_config.hf_config.image_token_id, images, max_image_tokens(ctx))


def expand_images(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<image>`` token becomes the tokens of its image; rows computed beforehand stand as those of one tile."""

    def tokens(image) -> tuple[int, ...]:
        if rows := embedding_rows(image):
            return _with_rows(ctx, tile_tokens(ctx.model_config)((0, 0)), rows)
        return tokens_of_image(ctx, (image.height, image.width))

    images = inputs.multi_modal_data.get("image", ())
    return expand_items(inputs, "image", ctx.model_config.hf_config.image_token_id, [tokens(image) for image in images])


# The model.


def patch_positions(config, rows: int, columns: int) -> Int[np.ndarray, " patches"]:
    """Where the patches of a tile stand in the grid of learned positions, which is stretched or squeezed over it.

    A side of 6 patches over one of 9 positions: 0, 1, 3, 4, 6, 7. Hugging Face computes the fractions in float32; for
    the sizes of all published models they round to the same.
    """
    side = config.image_size // config.patch_size
    lines, places = (np.arange(n, dtype=np.int32) * side // n for n in (rows, columns))
    return (lines[:, None] * side + places[None]).reshape(-1)


class Idefics3VisionEmbeddings(SiglipVisionEmbeddings):
    """SigLIP's patches and learned positions, over tiles of any size."""

    def __call__(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        """Rows of patches; pixels that fill no patch are left out."""
        height, width = (side // self.config.patch_size for side in pixel_values.shape[2:])
        positions = self.position_embedding.embedding[...][patch_positions(self.config, height, width)]
        return self.patch_embedding(pixel_values) + positions[None]


class Idefics3VisionTransformer(nnx.Module):
    """SigLIP's tower over tiles of any size, with its last norm."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.embeddings = Idefics3VisionEmbeddings(config, **kw)
        self.encoder = VisionEncoder(config, **kw)
        self.post_layernorm = vision_norm(config, **kw)

    def __call__(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        """Rows of patches."""
        (x,) = self.encoder(self.embeddings(pixel_values), (-1,))
        return self.post_layernorm(x)


class Idefics3Connector(nnx.Module):
    """Rows of patches to fewer rows as wide as the language model."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.scale_factor = config.scale_factor
        fan_in, fan_out = config.vision_config.hidden_size * config.scale_factor**2, config.text_config.hidden_size
        self.modality_projection = nnx.Linear(
            fan_in, fan_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B patches tower"], height: int, width: int) -> Float[Array, "B rows D"]:
        """A row for each square of patches of a tile that is ``height`` x ``width`` of them."""
        B, factor = len(x), self.scale_factor
        x = x.reshape(B, height // factor, factor, width // factor, factor, -1).swapaxes(2, 3)
        return self.modality_projection(x.reshape(B, height * width // factor**2, -1))


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class Idefics3ForConditionalGeneration(OverLanguageModel):
    """Idefics3 over Llama or Mistral."""

    traits = ("tiles, with their names in the prompt", "pixel shuffle")
    family = "Idefics3"
    language_models: ClassVar[Mapping[str, str]] = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

    weight_rules = (
        WeightRule(r".*\.rotary_emb\.inv_freq|.*\.position_ids", None),
        WeightRule(r"(?:model\.)?vision_model\.(.*)", r"vision_model.\1"),
        WeightRule(r"(?:model\.)?connector\.modality_projection\.(?:proj\.)?(.*)", r"connector.modality_projection.\1"),
        WeightRule(r"model\.text_model\.(.*)", r"language_model.model.\1"),
        WeightRule(r"lm_head\.(.*)", r"language_model.lm_head.\1"),
        WeightRule(r"(language_model\..*)", r"\1"),  # files that we wrote
    )
    media_shapes = staticmethod(media_shapes)

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        for field in ("image_size", "patch_size"):
            if not isinstance(value := getattr(config.vision_config, field), int):
                raise ConfigError(f"vision_config.{field} {value!r} is not supported: one number is, for both sides")
        self.config = config
        kw = {"dtype": dtype, "rngs": rngs}
        self.vision_model = Idefics3VisionTransformer(config.vision_config, **kw)
        self.connector = Idefics3Connector(config, **kw)
        # The outer config decides, as in Hugging Face.
        self.language_model = self.make_language_model(config, tied=config.tie_word_embeddings, **kw)

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return "<image>"

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image, tile after tile; images of different numbers of tiles come as a sequence of arrays."""
        if image_embeds is not None:
            return {"image": list(image_embeds)}
        if isinstance(pixel_values, Sequence):
            return {"image": [self._rows(tiles[None])[0] for tiles in pixel_values]}
        return {"image": list(self._rows(pixel_values))}

    def _rows(self, pixel_values: Float[Array, "items tiles C height width"]) -> Float[Array, "items rows D"]:
        height, width = (side // self.config.vision_config.patch_size for side in pixel_values.shape[3:])
        features = self.vision_model(pixel_values.reshape(-1, *pixel_values.shape[2:]))
        rows = self.connector(features, height, width)
        return rows.reshape(len(pixel_values), -1, rows.shape[-1])

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches.

        With pixels (or embeddings) the rows of the images replace the ``<image>`` tokens in order; there must be
        one token per row. ``inputs_embeds`` takes the place of both.
        """
        if inputs_embeds is None:
            given = len(pixel_values) or image_embeds is not None
            media = self.embed_multimodal(pixel_values, image_embeds) if given else {}
            inputs_embeds = self.embed_with_media(input_ids, media)
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)


class SmolVLMForConditionalGeneration(Idefics3ForConditionalGeneration):
    """SmolVLM and SmolVLM2, for images: Idefics3's architecture with smaller parts."""
