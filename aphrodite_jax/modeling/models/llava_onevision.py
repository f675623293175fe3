"""LLaVA-OneVision: LLaVA-NeXT's tiles in larger grids, and videos (https://arxiv.org/abs/2408.03326).

How an image becomes tokens: it is fitted into the grid of tiles that keeps most of its pixels, padded to it, and cut;
the tower and the projector see each tile, and the whole image at a tile's size, by themselves. The rows of the whole
come first. The patches of the tiles follow as one picture, without those of the padding. Where they are more than the
patches of as many tiles as ``vision_aspect_ratio`` says (``anyres_max_9``), the picture is made smaller: each row is a
mean of up to four patches. Each line ends with the learned row ``image_newline``. The mapper says of which patches a
row is a mean, and with which weights: the model's shapes tell the number of rows and nothing in it depends on values.

A video's frames are seen whole. The patches of each are made a picture of half its sides in the same way; one
``image_newline`` follows the last frame.

Hugging Face's processor cuts an image into tiles where it is the only one of its prompt, or where images come in one
flat list; of several images in a list for each prompt it makes one padded square each. What becomes of an item does not
depend on the others here: every image is cut, as in the flat list.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import INPUT_REGISTRY, DummyData, InputContext, LLMInputs, dummy_prompt_of, expand_items
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache
from aphrodite_jax.modeling.layers.stack import in_parts
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.llava import LlavaForConditionalGeneration
from aphrodite_jax.modeling.models.llava_next import grid_of, unpad
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, Video, embedding_rows
from aphrodite_jax.multimodal.frames import MAX_FRAMES, frames_alone, frames_that_fit, map_frames
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor
from aphrodite_jax.multimodal.plugins.image import ImagePlugin

__all__ = ["LlavaOnevisionForConditionalGeneration"]

TILES_AT_A_TIME = 8
"""Tiles that go through the tower together; a video is encoded with as many frames as fill whole such parts."""
LARGEST_RATIO = 1.1
"""How many times as long in its sides as that of the most tiles a picture may be before it is made smaller."""

# Inputs: pure functions of the config and of one request.


def patches_a_side(config) -> int:
    """Patches along a side of a tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def most_tiles(config) -> int:
    """Tiles of whose patches a picture has at most as many.

    Raises:
      ConfigError: ``vision_aspect_ratio`` does not tell.
    """
    found = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if not found or not int(found[1]):
        raise ConfigError(
            f"vision_aspect_ratio {config.vision_aspect_ratio!r} is not supported: it is 'anyres_max_' and a number"
        )
    return int(found[1])


def scaled(config, picture: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of rows that a picture of so many lines and columns of patches becomes.

    With tiles of 27 x 27 and nine of them: 162 x 162 patches are twice as long in their sides as 81 x 81, which they
    become; 85 x 85 patches stay as they are.
    """
    lines, columns = picture
    ratio = math.sqrt(lines * columns / (most_tiles(config) * patches_a_side(config) ** 2))
    return (int(lines // ratio), int(columns // ratio)) if ratio > LARGEST_RATIO else picture


def picture_of(config, size: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of the patches that show an image of ``size`` (height, width) in the grid of its tiles."""
    side, (tile_rows, tile_columns) = patches_a_side(config), grid_of(config, size)
    height, width = unpad(np.broadcast_to(np.int8(0), (tile_rows * side, tile_columns * side)), size).shape
    return height, width


def num_image_tokens(config, size: tuple[int, int]) -> int:
    """Rows that the model makes of an image of ``size`` (height, width), and tokens that stand for it in the prompt."""
    lines, columns = scaled(config, picture_of(config, size))
    return patches_a_side(config) ** 2 + lines * (columns + 1)


Means = tuple[Int[np.ndarray, "rows 4"], Float[np.ndarray, "rows 4"]]
"""For each row the four rows of the projector that it is a mean of, and their weights.

They are numbered from 1, tile after tile or frame after frame; 0 is ``image_newline``.
"""


def image_means(config, size: tuple[int, int]) -> Means:
    """The rows of an image of ``size`` (height, width): of the whole, then of the tiles' picture, line by line."""
    side, (tile_rows, tile_columns) = patches_a_side(config), grid_of(config, size)
    tiles = _numbered(1 + tile_rows * tile_columns, side)
    grid = tiles[1:].reshape(tile_rows, tile_columns, side, side).swapaxes(1, 2)
    picture = unpad(grid.reshape(tile_rows * side, tile_columns * side), size)
    index, weight = _resized(picture, scaled(config, picture_of(config, size)))
    newline_index, newline_weight = _unmixed(np.zeros((len(index), 1), np.int32))
    lines = np.concatenate([index, newline_index], axis=1), np.concatenate([weight, newline_weight], axis=1)
    return _joined([_unmixed(tiles[0]), lines])


def video_means(config, frames: int) -> Means:
    """The rows of a video: of its frames, each half as long in its sides, and one at the end."""
    side = frame_side(config)
    pictures = [_resized(frame, (side, side)) for frame in _numbered(frames, patches_a_side(config))]
    return _joined([*pictures, _unmixed(np.zeros(1, np.int32))])


def _numbered(count: int, side: int) -> Int[np.ndarray, "count side side"]:
    return 1 + np.arange(count * side**2, dtype=np.int32).reshape(count, side, side)


def _resized(picture: Int[np.ndarray, "h w"], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Index and weight ``[lines, columns, 4]`` of the rows that a picture becomes, by linear interpolation."""
    (line, line_weight), (column, column_weight) = map(_between, picture.shape, size)
    index = picture[line[:, None, :, None], column[None, :, None, :]]  # [lines, columns, 2, 2]
    weight = line_weight[:, None, :, None] * column_weight[None, :, None, :]
    return index.reshape(*size, 4), weight.reshape(*size, 4)


def _between(patches: int, rows: int) -> tuple[Int[np.ndarray, "rows 2"], Float[np.ndarray, "rows 2"]]:
    """The two of ``patches`` in a line between which each of fewer ``rows`` lies, and the weight of both.

    Of 4 patches for 3 rows, whose centres lie at 1/6, 3/2 and 17/6 of a patch's length behind the first patch's: the
    first row is 5/6 of patch 0 and 1/6 of patch 1, the second half of patch 1 and half of patch 2.
    """
    centres = np.maximum((np.arange(rows) + 0.5) * patches / rows - 0.5, 0)
    first = centres.astype(np.int32)
    weight = centres - first
    return np.stack([first, np.minimum(first + 1, patches - 1)], axis=1), np.stack([1 - weight, weight], axis=1)


def _unmixed(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and weight of rows that are one each."""
    index = np.repeat(index[..., None], 4, axis=-1)
    return index, np.broadcast_to([1.0, 0, 0, 0], index.shape)


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Means:
    index, weight = (np.concatenate([array.reshape(-1, 4) for array in arrays]) for arrays in zip(*parts, strict=True))
    return index.astype(np.int32), weight.astype(np.float32)


def tile_counts(config) -> list[int]:
    """Tiles of an image as it is encoded, descending: those of some grids, each less than 4/5 of the one before."""
    kept = []
    for count in sorted({1 + math.prod(_tiles(config, size)) for size in config.image_grid_pinpoints}, reverse=True):
        if not kept or 1.25 * count < kept[-1]:
            kept.append(count)
    return kept


def encoded_tiles(config, tiles: int) -> int:
    """Tiles of which an image of ``tiles`` is encoded: at most a quarter more."""
    return min(count for count in tile_counts(config) if count >= tiles)


@OncePerConfig
def largest_images(config) -> dict[int, tuple[int, int]]:
    """Number of tiles as encoded to the size (height, width) of an image of so many that has the most rows.

    Images that come into question fill the lines of a grid or its columns, and in the other direction are as long as
    they can be before they end with another patch: shorter ones may fit a smaller grid. Larger and smaller ones of the
    same proportions have a picture of the same size, or another grid.
    """
    largest = {}
    for size in _images_of_every_picture(config):
        tiles = encoded_tiles(config, 1 + math.prod(grid_of(config, size)))
        largest[tiles] = max(largest.get(tiles, size), size, key=lambda size: num_image_tokens(config, size))
    return largest


def _images_of_every_picture(config) -> Iterator[tuple[int, int]]:
    for height, width in config.image_grid_pinpoints:
        lines, columns = (patches_a_side(config) * tiles for tiles in _tiles(config, (height, width)))
        yield height, width
        yield from ((height, length) for length in _longest(width, columns))
        yield from ((length, width) for length in _longest(height, lines))


def _longest(pixels: int, patches: int) -> Iterator[int]:
    """For each number of whole patches that is less than all of ``patches``, the most pixels that cover no more.

    Of 56 pixels and 4 patches: 13, 27, 41 and 55, which cover none to three.
    """
    return (max(-(-covered * pixels // patches) - 1, 1) for covered in range(1, patches + 1))


def _tiles(config, size: Sequence[int]) -> tuple[int, int]:
    return size[0] // config.vision_config.image_size, size[1] // config.vision_config.image_size


def size_of_most_rows(config) -> tuple[int, int]:
    """The size (height, width) of an image that has the most rows of all."""
    return max(largest_images(config).values(), key=lambda size: num_image_tokens(config, size))


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of the image that takes most of them."""
    return num_image_tokens(_config(ctx), size_of_most_rows(_config(ctx)))


def frame_side(config) -> int:
    """Rows along a side of a video's frame."""
    return -(-patches_a_side(config) // 2)


def num_video_tokens(config, frames: int) -> int:
    """Rows that the model makes of a video, and tokens that stand for it in the prompt."""
    return frames * frame_side(config) ** 2 + 1


def max_frames(ctx: InputContext) -> int:
    """Frames of each video of a prompt at its limits, `frames_that_fit`."""
    return frames_that_fit(ctx, max_image_tokens(ctx), lambda frames: num_video_tokens(_config(ctx), frames))


def most_frames(ctx: InputContext) -> int:
    """Frames of a video that is alone in its prompt, `frames_alone`."""
    return frames_alone(ctx, lambda frames: num_video_tokens(_config(ctx), frames))


def max_video_tokens(ctx: InputContext) -> int:
    """Tokens of each video of a prompt at its limits."""
    return num_video_tokens(_config(ctx), max_frames(ctx))


def most_video_tokens(ctx: InputContext) -> int:
    """Tokens of a video that is alone in its prompt, at most."""
    return num_video_tokens(_config(ctx), most_frames(ctx))


def map_images(ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
    """``pixel_values`` of the tiles of each image, the whole first, and its `image_means`.

    Raises:
      ConfigError: the image processor cuts into other tiles than the model's config says.
    """
    return MultiModalInputs.batch([_map_image(ctx, item) for item in items])


def _map_image(ctx: InputContext, image: Image.Image) -> MultiModalInputs:
    config, size = _config(ctx), (image.height, image.width)
    (mapped,) = ImagePlugin().default_mapper(ctx, [image]).split()
    pixels = np.asarray(mapped["pixel_values"])
    expected = (1 + math.prod(grid_of(config, size)), 3, *[config.vision_config.image_size] * 2)
    if pixels.shape != expected:
        raise ConfigError(
            f"the image processor made tiles {list(pixels.shape)} of an image of {image.width} x {image.height} pixels,"
            f" the model's config says {list(expected)}: they must have the same image_grid_pinpoints and tile size"
        )
    index, weight = image_means(config, size)
    return MultiModalInputs({"pixel_values": pixels, "row_index": index, "row_weight": weight})


def map_videos(ctx: InputContext, items: Sequence[Video]) -> MultiModalInputs:
    """``pixel_values_videos`` of the frames of each video, and its `video_means`.

    Raises:
      ConfigError: the frames are made another size than the tower takes.
      MediaError: a video has too many frames.
    """
    return MultiModalInputs.batch([_map_video(ctx, item) for item in items])


def _map_video(ctx: InputContext, video: Video) -> MultiModalInputs:
    config = _config(ctx)
    pixels = np.stack(map_frames(ctx, frame_processor(ctx.model_config), video)).astype(np.float32)
    side = config.vision_config.image_size
    if pixels.shape[2:] != (side, side):
        raise ConfigError(
            f"the video processor makes frames of {' x '.join(map(str, pixels.shape[2:]))} pixels, the tower takes "
            f"{side} x {side}: they must be the same"
        )
    index, weight = video_means(config, len(video))
    return MultiModalInputs({"pixel_values_videos": pixels, "video_row_index": index, "video_row_weight": weight})


@OncePerConfig
def frame_processor(model_config: ModelConfig) -> Any:
    """The checkpoint's image processor without its tiles."""
    processor = image_processor(model_config)
    names = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return transformers.SiglipImageProcessorPil(**{name: getattr(processor, name) for name in names})


def pad_media(config, mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An image with as many tiles as `encoded_tiles` and as many rows as any of so many; a video of whole parts."""
    sizes = {}
    if "pixel_values" in mm_kwargs:
        sizes["pixel_values"] = encoded_tiles(config, mm_kwargs["pixel_values"].shape[1])
        most_rows = num_image_tokens(config, largest_images(config)[sizes["pixel_values"]])
        sizes |= {"row_index": most_rows, "row_weight": most_rows}
    if "pixel_values_videos" in mm_kwargs:
        frames = mm_kwargs["pixel_values_videos"].shape[1]
        frames += -frames % TILES_AT_A_TIME
        most_rows = num_video_tokens(config, frames)
        sizes |= {"pixel_values_videos": frames, "video_row_index": most_rows, "video_row_weight": most_rows}

    def padded(array: np.ndarray, size: int) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, size - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])

    return {**mm_kwargs, **{name: padded(mm_kwargs[name], size) for name, size in sizes.items()}}


def media_shapes(ctx: InputContext) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of an image for each number of tiles as encoded, and of a video for each number of whole parts."""
    config = _config(ctx)
    vision = config.vision_config
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    images = [(tiles, num_image_tokens(config, size)) for tiles, size in largest_images(config).items()]
    parts = range(TILES_AT_A_TIME, most_frames(ctx) + TILES_AT_A_TIME, TILES_AT_A_TIME)
    videos = [(frames, num_video_tokens(config, frames)) for frames in parts]
    return [
        {
            pixels: jax.ShapeDtypeStruct((1, count, *tile), np.float32),
            f"{prefix}row_index": jax.ShapeDtypeStruct((1, rows, 4), np.int32),
            f"{prefix}row_weight": jax.ShapeDtypeStruct((1, rows, 4), np.float32),
        }
        for pixels, prefix, sizes in (("pixel_values", "", images), ("pixel_values_videos", "video_", videos))
        for count, rows in sizes
    ]


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many of the largest images and videos as allowed, each behind its placeholder token, then padding."""
    config = _config(ctx)
    height, width = size_of_most_rows(config)
    images = [Image.new("RGB", (width, height))] * mm_counts["image"]
    videos = [np.zeros((max_frames(ctx), 1, 1, 3), np.uint8)] * mm_counts["video"]
    return dummy_prompt_of(
        seq_len,
        image=(config.image_token_index, images, max_image_tokens(ctx)),
        video=(config.video_token_index, videos, max_video_tokens(ctx)),
    )


def expand_media(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<image>`` and each ``<video>`` token becomes one token per row of its item."""
    config = _config(ctx)
    images, videos = inputs.multi_modal_data.get("image", ()), inputs.multi_modal_data.get("video", ())
    rows = [embedding_rows(image) or num_image_tokens(config, (image.height, image.width)) for image in images]
    inputs = expand_items(inputs, "image", config.image_token_index, rows)
    rows = [embedding_rows(video) or num_video_tokens(config, len(video)) for video in videos]
    return expand_items(inputs, "video", config.video_token_index, rows)


def _config(ctx: InputContext) -> Any:
    return ctx.get_hf_config(transformers.LlavaOnevisionConfig)


# The model.


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_video_input_mapper(map_videos)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@MULTIMODAL_REGISTRY.register_max_video_tokens(most_video_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_media)
class LlavaOnevisionForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-OneVision over Qwen2, Llama or Mistral."""

    traits = ("tiles of any grid, made smaller where they are many", "videos of pooled frames")

    weight_rules = (
        WeightRule(r"(?:model\.)?image_newline", r"image_newline"),
        *LlavaForConditionalGeneration.weight_rules,
    )
    video_sampling: ClassVar[Mapping[str, Any]] = {"max_frames": MAX_FRAMES}
    pad_media = staticmethod(pad_media)
    media_shapes = staticmethod(media_shapes)

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        most_tiles(config)  # which refuses what does not tell
        if config.vision_feature_select_strategy != "full":
            raise ConfigError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of LLaVA-OneVision is not "
                "supported: tiles are put together from all rows of the tower, as with 'full'"
            )
        super().__init__(config, dtype=dtype, rngs=rngs)
        if self.vision_tower.has_class_token:
            raise ConfigError(
                f"LLaVA-OneVision over a {config.vision_config.model_type} is not supported: 'full' keeps its class "
                "token, which is no patch; there is siglip_vision_model"
            )
        width = config.text_config.hidden_size
        self.image_newline = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), dtype))

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return f"<{modality}>"

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        row_index: Int[Array, "items rows 4"] | Sequence[Int[Array, "rows 4"]] = (),
        row_weight: Float[Array, "items rows 4"] | Sequence[Float[Array, "rows 4"]] = (),
        pixel_values_videos: Float[Array, "items frames C height width"]
        | Sequence[Float[Array, "frames C height width"]] = (),
        video_row_index: Int[Array, "items rows 4"] | Sequence[Int[Array, "rows 4"]] = (),
        video_row_weight: Float[Array, "items rows 4"] | Sequence[Float[Array, "rows 4"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        video_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image and video; items of different shapes come as a sequence of arrays."""
        kinds: dict[str, tuple[Any, ...]] = {
            "image": (image_embeds, pixel_values, row_index, row_weight),
            "video": (video_embeds, pixel_values_videos, video_row_index, video_row_weight),
        }
        found: dict[str, Sequence[Float[Array, "rows D"]]] = {}
        for modality, (embeds, *arrays) in kinds.items():
            if embeds is not None:
                found[modality] = list(embeds)
            elif any(isinstance(array, Sequence) for array in arrays):
                items = zip(*arrays, strict=True)
                found[modality] = [self._rows(*(array[None] for array in item))[0] for item in items]
            else:
                found[modality] = list(self._rows(*arrays))
        return {modality: rows for modality, rows in found.items() if rows}

    def _rows(
        self,
        pixel_values: Float[Array, "items tiles C height width"],
        row_index: Int[Array, "items rows 4"],
        row_weight: Float[Array, "items rows 4"],
    ) -> Float[Array, "items rows D"]:
        tiles = pixel_values.reshape(-1, *pixel_values.shape[2:])
        features = in_parts(self._features, tiles, TILES_AT_A_TIME)
        features = features.reshape(len(pixel_values), -1, features.shape[-1])
        newline = self.image_newline[...].astype(features.dtype)
        newline = jnp.broadcast_to(newline, (len(features), 1, features.shape[-1]))
        features = jnp.concatenate([newline, features], axis=1)
        rows = jnp.zeros((*row_index.shape[:2], features.shape[-1]), jnp.float32)
        for corner in range(4):  # one after another, so that there are never four times as many rows
            taken = jnp.take_along_axis(features, row_index[..., corner, None], axis=1)
            rows += row_weight[..., corner, None] * taken.astype(jnp.float32)
        return rows.astype(features.dtype)

    def _features(self, tiles: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        return jnp.asarray(super().embed_multimodal(tiles)["image"])

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        pixel_values: Float[Array, "items tiles C height width"] | Sequence[Float[Array, "tiles C height width"]] = (),
        row_index: Int[Array, "items rows 4"] | Sequence[Int[Array, "rows 4"]] = (),
        row_weight: Float[Array, "items rows 4"] | Sequence[Float[Array, "rows 4"]] = (),
        pixel_values_videos: Float[Array, "items frames C height width"]
        | Sequence[Float[Array, "frames C height width"]] = (),
        video_row_index: Int[Array, "items rows 4"] | Sequence[Int[Array, "rows 4"]] = (),
        video_row_weight: Float[Array, "items rows 4"] | Sequence[Float[Array, "rows 4"]] = (),
        image_embeds: Float[Array, "items rows D"] | None = None,
        video_embeds: Float[Array, "items rows D"] | None = None,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches.

        With pixels (or embeddings) the rows of images replace the ``<image>`` tokens in order, those of videos the
        ``<video>`` tokens; there must be one token per row. ``inputs_embeds`` takes the place of both.
        """
        if inputs_embeds is None:
            images = (pixel_values, row_index, row_weight)
            videos = (pixel_values_videos, video_row_index, video_row_weight)
            media = self.embed_multimodal(*images, *videos, image_embeds, video_embeds)
            inputs_embeds = self.embed_with_media(input_ids, media)
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)
