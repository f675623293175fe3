"""LLaVA-NeXT (LLaVA-1.6): LLaVA that sees an image whole and in tiles (https://llava-vl.github.io/blog/2024-01-30-llava-next).

How an image becomes tokens: it is fitted into the grid of tiles that keeps most of its pixels, padded to it, and cut;
the tower and the projector see each tile, and the whole image at a tile's size, by themselves. The rows of the whole
come first. The rows of the tiles follow, line by line over all of the grid, without those of the padding, and each
line ends with the learned row ``image_newline``. How many that are depends on the image's size: the mapper says with
``row_index`` which rows stand where, so that the model's shapes tell the number and nothing in it depends on values.
"""

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
from transformers.image_processing_utils import select_best_resolution

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import INPUT_REGISTRY, DummyData, InputContext, LLMInputs, dummy_prompt, expand_items
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.llava import LlavaForConditionalGeneration
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, embedding_rows
from aphrodite_jax.multimodal.plugins.image import ImagePlugin

__all__ = ["LlavaNextForConditionalGeneration"]

# Inputs: pure functions of the config and of one request.


def grid_of(config, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tiles that an image of ``size`` (height, width) is cut into."""
    pinpoints = [tuple(point) for point in config.image_grid_pinpoints]
    height, width = select_best_resolution(tuple(size), pinpoints)
    return height // config.vision_config.image_size, width // config.vision_config.image_size


def row_index(config, size: tuple[int, int]) -> Int[np.ndarray, " rows"]:
    """Where each of an image's rows stands among those of all its tiles, tile after tile, the whole image first.

    ``image_newline`` stands behind them all.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = grid_of(config, size)
    tiles = np.arange((1 + rows * columns) * side**2, dtype=np.int32).reshape(-1, side, side)
    whole, grid = tiles[0], tiles[1:].reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, -1)
    lines = unpad(grid, size)
    newline = np.full((len(lines), 1), tiles.size, np.int32)
    return np.concatenate([whole.reshape(-1), np.concatenate([lines, newline], axis=1).reshape(-1)])


def unpad(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The lines and columns of a grid of patches that an image of ``size`` covers, as Hugging Face rounds them."""
    height, width = size
    lines, columns = grid.shape
    if width / height > columns / lines:
        padding = (lines - int(round(height * (columns / width), 7))) // 2
        return grid[padding : lines - padding]
    padding = (columns - int(round(width * (lines / height), 7))) // 2
    return grid[:, padding : columns - padding]


def sizes_of_grids(config) -> list[tuple[int, int]]:
    """For each grid of tiles the size (height, width) of an image that fills it."""
    return [tuple(point) for point in config.image_grid_pinpoints]


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of the image that takes most of them: one that fills its grid."""
    config = _config(ctx)
    return max(len(row_index(config, size)) for size in sizes_of_grids(config))


def map_images(ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
    """``pixel_values`` of the tiles of each image, the whole first, and its ``row_index``.

    Raises:
      ConfigError: the image processor cuts into other tiles than the model's config says.
    """
    return MultiModalInputs.batch([_map_image(ctx, item) for item in items])


def _map_image(ctx: InputContext, image: Any) -> MultiModalInputs:
    config = _config(ctx)
    (mapped,) = ImagePlugin().default_mapper(ctx, [image]).split()
    if "pixel_values" not in mapped:  # embeddings
        return mapped
    rows, columns = grid_of(config, _size(image))
    if len(mapped["pixel_values"]) != 1 + rows * columns:
        raise ConfigError(
            f"the image processor cut an image of {image.width} x {image.height} pixels into "
            f"{len(mapped['pixel_values'])} tiles, the config's image_grid_pinpoints say {1 + rows * columns}: "
            "they must be the same in both"
        )
    return MultiModalInputs({"pixel_values": mapped["pixel_values"], "row_index": row_index(config, _size(image))})


def pad_media(config, mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An image's arrays with as many rows as any image of so many tiles has: a shape for each number of tiles."""
    tiles, index = mm_kwargs["pixel_values"].shape[1], mm_kwargs["row_index"]
    counts = {
        len(row_index(config, size)) for size in sizes_of_grids(config) if 1 + math.prod(grid_of(config, size)) == tiles
    }
    return {**mm_kwargs, "row_index": np.pad(index, ((0, 0), (0, max(counts) - index.shape[1])))}


def media_shapes(ctx: InputContext) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of an image of each number of tiles."""
    config = _config(ctx)
    side, channels = config.vision_config.image_size, config.vision_config.num_channels
    rows: dict[int, int] = {}
    for size in sizes_of_grids(config):
        tiles = 1 + math.prod(grid_of(config, size))
        rows[tiles] = max(rows.get(tiles, 0), len(row_index(config, size)))
    return [
        {
            "pixel_values": jax.ShapeDtypeStruct((1, tiles, channels, side, side), np.float32),
            "row_index": jax.ShapeDtypeStruct((1, count), np.int32),
        }
        for tiles, count in rows.items()
    ]


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many of the largest images as allowed, each behind its placeholder token, then padding to ``seq_len``."""
    config: Any = _config(ctx)
    height, width = max(sizes_of_grids(config), key=lambda size: len(row_index(config, size)))
    images = [Image.new("RGB", (width, height))] * mm_counts["image"]
    return dummy_prompt(seq_len, "image", config.image_token_index, images, max_image_tokens(ctx))


def expand_images(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<image>`` token becomes one token per row of its image."""
    config = _config(ctx)
    images = inputs.multi_modal_data.get("image", ())
    lengths = [embedding_rows(image) or len(row_index(config, _size(image))) for image in images]
    return expand_items(inputs, "image", config.image_token_index, lengths)


def _config(ctx: InputContext) -> Any:
    return ctx.get_hf_config(transformers.LlavaNextConfig)


def _size(image: Image.Image) -> tuple[int, int]:
    return image.height, image.width


# The model.


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class LlavaNextForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-NeXT over Llama, Mistral or Qwen2."""

    traits = ("tiles of the best grid", "padding taken out again", "learned row behind each line")

    weight_rules = (
        WeightRule(r"(?:model\.)?image_newline", r"image_newline"),
        *LlavaForConditionalGeneration.weight_rules,
    )
    pad_media = staticmethod(pad_media)
    media_shapes = staticmethod(media_shapes)

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        if config.vision_feature_select_strategy != "default":
            raise ConfigError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of LLaVA-NeXT is not "
                "supported: tiles are put together from their patches alone, as with 'default'"
            )
        super().__init__(config, dtype=dtype, rngs=rngs)
        if not self.vision_tower.has_class_token:
            raise ConfigError(
                f"LLaVA-NeXT over a {config.vision_config.model_type} is not supported: 'default' drops the first row "
                "of a tile, which must be a class token; there is clip_vision_model"
            )
        width = config.text_config.hidden_size
        self.image_newline = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), dtype))

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        row_index: Int[Array, "items rows"] | Sequence[Int[Array, " rows"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image; images of different shapes come as a sequence of arrays."""
        if image_embeds is not None:
            return {"image": list(image_embeds)}
        if isinstance(pixel_values, Sequence) or isinstance(row_index, Sequence):
            pairs = zip(pixel_values, row_index, strict=True)
            return {"image": [self._rows(pixels[None], index[None])[0] for pixels, index in pairs]}
        return {"image": list(self._rows(pixel_values, row_index))}

    def _rows(self, pixel_values, row_index):
        items, tiles = pixel_values.shape[:2]
        features = super().embed_multimodal(pixel_values.reshape(-1, *pixel_values.shape[2:]))["image"]
        features = jnp.stack(features).reshape(items, tiles * features[0].shape[0], -1)
        newline = jnp.broadcast_to(self.image_newline[...].astype(features.dtype), (items, 1, features.shape[-1]))
        return jnp.take_along_axis(jnp.concatenate([features, newline], axis=1), row_index[..., None], axis=1)

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        row_index: Int[Array, "items rows"] | Sequence[Int[Array, " rows"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """As `LlavaForConditionalGeneration`; images of different shapes come as a sequence of arrays."""
        if inputs_embeds is None:
            given = len(pixel_values) or image_embeds is not None
            media = self.embed_multimodal(pixel_values, row_index, image_embeds) if given else {}
            inputs_embeds = self.embed_with_media(input_ids, media)
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)
