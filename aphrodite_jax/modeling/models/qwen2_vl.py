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

All sizes of images come down to a few shapes: `pad_media` puts squares behind an image that see nothing and are not
seen. Qwen2.5-VL (`qwen2_5_vl`) and Qwen3-VL (`qwen3_vl`) share all this; what they do otherwise are the static methods
``arrange``, ``frame_limits``, ``video_tokens`` and ``num_text_tokens`` of the model class, their towers and decoders.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError, RequestError
from aphrodite_jax.inputs import (
    INPUT_REGISTRY,
    DummyData,
    InputContext,
    LLMInputs,
    PlacedItem,
    expand_items,
)
from aphrodite_jax.inputs.placeholders import Tokens
from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache, attend_batch
from aphrodite_jax.modeling.layers.embedding import PatchEmbed, merge_multimodal_embeddings
from aphrodite_jax.modeling.layers.rotary import RotaryTable, apply_rotary
from aphrodite_jax.modeling.layers.stack import call_layer
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.interfaces import MaskSpec, SupportsMRoPE, SupportsMultiModal
from aphrodite_jax.modeling.models.qwen2 import Qwen2ForCausalLM
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, Video, embedding_rows
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor
from aphrodite_jax.multimodal.video import frame_sampling, video_processor_options
from kernels_pallas.intervals import RowIntervals, runs, segments

__all__ = [
    "PixelLimits",
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLVisionTower",
    "VideoLimits",
    "VisionAttention",
    "VisionBlock",
    "arrange",
    "in_squares",
    "map_videos",
    "prompt_positions",
]

MOST_NARROW = 200
"""Times that a side of an image may be longer than the other at most."""
FEWEST_ROWS = 16
"""Shapes of fewer are not worth a program."""
LATEST_FRAME = 99_999.9
"""Seconds from a video's start at which the longest text of a time is expected."""
EPSILON = 1e-6
"""Of the tower's norms; no config has it."""

Squares = tuple[int, int, int]
"""Layers, and lines and columns of squares in each: the rows of an image or video."""

# Inputs: pure functions of the config and of one request.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelLimits:
    """How many pixels an image, or a frame of a video, has when it is resized.

    Attributes:
      side: pixels along a side of a square.
      least, most: pixels in all.
      num_frames: frames that have these pixels together.
      counted_frames: the same, where it is asked whether they are within the limits.
      whole_square: whether what is smaller than a square is made as large as one first.
    """

    side: int
    least: int
    most: int
    num_frames: int = 1
    counted_frames: int = 1
    whole_square: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What the checkpoint's video processor says of sizes.

    Attributes:
      side: pixels along a side of a square.
      layer: frames of a layer.
      least, most: pixels, as the family counts them.
      is_capped: whether ``max_tokens`` counts.
      max_tokens: as the family counts them.
      max_frames: of a video.
    """

    side: int
    layer: int
    least: int
    most: int
    is_capped: bool
    max_tokens: int
    max_frames: int


def squares_of(limits: PixelLimits, size: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of the squares that an image of ``size`` (height, width) is resized to.

    Hugging Face's ``smart_resize``, in its order of operations. With sides of 28, 100 x 130 pixels are 4 x 5 squares;
    if only 15 are allowed, both sides shrink alike, and 3 x 4 are left.

    Raises:
      MediaError: it is too narrow.
    """
    side, (height, width) = limits.side, size
    if limits.whole_square and min(size) < side:
        scale = max(side / height, side / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MOST_NARROW * min(height, width):
        raise MediaError(
            f"an image of {size[1]} x {size[0]} pixels is too narrow: its longer side is {MOST_NARROW} times the other "
            "at most; crop it"
        )
    lines, columns = round(height / side), round(width / side)
    pixels = limits.counted_frames * lines * columns * side**2
    area = limits.num_frames * height * width
    if pixels > limits.most:
        shrink = math.sqrt(area / limits.most)
        lines, columns = (max(1, math.floor(length / shrink / side)) for length in (height, width))
    elif pixels < limits.least:
        grow = math.sqrt(limits.least / area)
        lines, columns = (math.ceil(length * grow / side) for length in (height, width))
    return lines, columns


def image_limits(ctx: InputContext) -> PixelLimits:
    """Those of the checkpoint's image processor.

    Raises:
      ConfigError: it is another kind of processor, or its options and the model do not go together.
    """
    config: Any = ctx.get_hf_config()
    processor = image_processor(ctx.model_config)
    if not isinstance(processor, transformers.Qwen2VLImageProcessorPil):
        raise ConfigError(
            f"the image processor {type(processor).__name__} does not cut images into the patches that "
            f"{type(config).__name__} means; there is Qwen2VLImageProcessor"
        )
    expected = _of_patches(config.vision_config)
    found = {name: getattr(processor, name) for name in expected}
    if found != expected or not processor.do_resize:
        raise ConfigError(
            f"the image processor has {found} and do_resize {processor.do_resize}; for this model they are {expected} "
            "and True"
        )
    least, most = _least_and_most(processor.size, "the image processor")
    return PixelLimits(side=processor.patch_size * processor.merge_size, least=least, most=most)


def _of_patches(vision: Any) -> dict[str, int]:
    """What the processors must say of patches."""
    return {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }


def _least_and_most(size: Any, who: str) -> tuple[int, int]:
    size = dict(size)
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    if not least or not most:
        raise ConfigError(f"size {size} of {who} needs 'shortest_edge' and 'longest_edge', pixels above 0")
    return least, most


@OncePerConfig
def video_limits(model_config: ModelConfig) -> VideoLimits:
    """Those of the checkpoint's video processor; what its files do not say is as in Hugging Face.

    The options of ``mm_processor_kwargs`` that limit the pixels of images limit those of frames, where both count
    alike.

    Raises:
      ConfigError: its options and the model do not go together.
    """
    config: Any = model_config.hf_config
    model: Any = model_class(model_config)
    image = image_limits(InputContext(model_config))
    asked = {
        name: model_config.mm_processor_kwargs[name]
        for name in model.frame_options & {*model_config.mm_processor_kwargs}
    }
    options = {**model.video_defaults, **video_processor_options(model_config), **asked}
    processor = image_processor(model_config)
    for name in ("image_mean", "image_std", "do_rescale", "do_normalize", "do_resize", "rescale_factor", "resample"):
        if (value := options.get(name)) is not None and not np.array_equal(value, getattr(processor, name)):
            raise ConfigError(
                f"{name} {value} of the video processor is not supported: frames are prepared as images are, with "
                f"{getattr(processor, name)}"
            )
    expected = _of_patches(config.vision_config)
    if (found := {name: options.get(name, value) for name, value in expected.items()}) != expected:
        raise ConfigError(f"the video processor has {found}; for this model they are {expected}")
    size = dict(options["size"])
    if "min_pixels" in model.frame_options:  # they stand for two fields of ``size``, which they replace
        names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        size |= {field: options[name] for name, field in names.items() if options.get(name) is not None}
    least, most = _least_and_most(size, "the video processor")
    sampling = frame_sampling(model_config)
    return VideoLimits(
        side=image.side,
        layer=config.vision_config.temporal_patch_size,
        least=least,
        most=most,
        is_capped=bool(options.get("cap_pixels_per_frame")),
        max_tokens=options["max_video_tokens"],
        max_frames=max(sampling.max_frames, sampling.num_frames or 1),
    )


def frame_limits(limits: VideoLimits, num_frames: int) -> PixelLimits:
    """Those of each frame of a video. Where they are capped, frames share what so many tokens have."""
    most = limits.most
    if limits.is_capped:
        share = int(limits.max_tokens * limits.side**2 * 0.9) * limits.layer // num_frames
        most = max(min(most, share), int(limits.least * 1.05))
    return PixelLimits(side=limits.side, least=limits.least, most=most)


def rows_of_image(ctx: InputContext, size: tuple[int, int]) -> Squares:
    """The rows of an image of ``size`` (height, width).

    Raises:
      MediaError: as `squares_of`.
    """
    return (1, *squares_of(image_limits(ctx), size))


def rows_of_video(ctx: InputContext, num_frames: int, size: tuple[int, int]) -> Squares:
    """The rows of a video of so many frames of ``size`` (height, width).

    Raises:
      MediaError: as `squares_of`.
    """
    model: Any = model_class(ctx.model_config)
    limits = video_limits(ctx.model_config)
    return (-(-num_frames // limits.layer), *squares_of(model.frame_limits(limits, num_frames), size))


# What is largest, and the few shapes that all come down to.


def most_rows(limits: PixelLimits) -> int:
    """Rows of any image at most.

    An image that shrinks has as many squares as the pixels allow; where that is less than a line of them, it keeps the
    line, whose length is the root of 200 times as many. One that grows is rounded up on both sides: where it has
    ``count`` columns, it had more than one less, and the lines that this leaves for the pixels.
    """
    least, most = (pixels / limits.side**2 for pixels in (limits.least, limits.most))
    root = math.sqrt(least)
    columns = range(math.ceil(root), math.ceil(math.sqrt(MOST_NARROW) * root) + 1)
    grown = max(count * math.ceil(least / max(count - 1, root)) for count in columns)
    return max(math.floor(most), math.floor(math.sqrt(MOST_NARROW * most)), grown)


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of one image at most."""
    return most_rows(image_limits(ctx))


def largest_image(limits: PixelLimits) -> tuple[int, int]:
    """Size (height, width) of an image of the most rows; where odd limits are for odd shapes, nearly so."""
    lines, columns = square_grid(max(1, limits.most // limits.side**2))
    whole, narrow = (lines * limits.side, columns * limits.side), (limits.side, MOST_NARROW * limits.side)
    return max(whole, narrow, (1, MOST_NARROW), key=lambda size: math.prod(squares_of(limits, size)))


@functools.cache
def square_grid(rows: int) -> tuple[int, int]:
    """Lines and columns of the grid with the most rows up to so many, and of these the one most like a square."""
    grids = [(lines, rows // lines) for lines in range(math.isqrt(rows), 0, -1)]
    return max((grid for grid in grids if grid[1] <= MOST_NARROW * grid[0]), key=math.prod)


def max_video_tokens(ctx: InputContext) -> int:
    """Tokens of one video at most, of as many frames as the processor takes or a prompt has room for.

    Raises:
      ConfigError: there is no room.
    """
    return _max_video_tokens(ctx.model_config)


@OncePerConfig
def _max_video_tokens(model_config: ModelConfig) -> int:
    room = model_config.context_length
    tokens, _, _ = largest_video(InputContext(model_config), room)
    if not tokens:
        raise ConfigError(f"no video fits in {room} tokens: raise max_model_len")
    return tokens


def largest_video(ctx: InputContext, room: int) -> tuple[int, int, tuple[int, int]]:
    """Tokens, frames and their size (height, width) of a video of the most tokens up to ``room``; zeros for none."""
    model: Any = model_class(ctx.model_config)
    limits = video_limits(ctx.model_config)
    largest = (0, 0, (0, 0))
    for num_frames in range(model.least_frames, limits.max_frames + 1):
        frame = model.frame_limits(limits, num_frames)
        layers = -(-num_frames // limits.layer)
        text = model.num_text_tokens(ctx, layers)
        for sharing in {frame.num_frames, frame.counted_frames}:
            rows = min(max(1, frame.most // (sharing * frame.side**2)), (room - text) // layers)
            if rows > 0:
                height, width = (count * frame.side for count in square_grid(rows))
                tokens = math.prod(rows_of_video(ctx, num_frames, (height, width))) + text
                if largest[0] < tokens <= room:
                    largest = (tokens, num_frames, (height, width))
        if largest[0] == room:
            break
    return largest


def padded_rows(rows: int) -> int:
    """Rows that so many are padded to: 16, 24, 32, 48, 64, 96, and so on."""
    rows = max(rows, FEWEST_ROWS)
    power = 2 ** (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


def pad_media(config, mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An item's arrays with squares behind them, up to `padded_rows`, that see nothing and are not seen.

    What is for `prompt_positions` alone is left out.
    """
    (modality,) = {name.partition("_")[0] for name in mm_kwargs}
    arrays = {name.removeprefix(f"{modality}_"): array for name, array in mm_kwargs.items()}
    rows = arrays["patches"].shape[1] // config.vision_config.spatial_merge_size**2
    padded = {}
    for name, array in arrays.items():
        if name in ("grid", "seconds"):
            continue
        more = array.shape[1] // rows * (padded_rows(rows) - rows)
        padded[f"{modality}_{name}"] = np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))
        if name == "row_order":  # rows behind the others stay there
            padded[f"{modality}_{name}"][:, rows:] = np.arange(rows, rows + more)
    return padded


def media_shapes(ctx: InputContext) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """All shapes that `pad_media` gives one item's arrays."""
    config: Any = ctx.get_hf_config()
    model: Any = model_class(ctx.model_config)
    limits = image_limits(ctx)
    # An image that shrinks loses less than half of each side by rounding.
    least = min(limits.least, limits.most / 4) / limits.side**2
    bounds = {"image": (math.floor(least), max_image_tokens(ctx)), "video": (1, max_video_tokens(ctx))}
    square = np.zeros((config.vision_config.spatial_merge_size**2, patch_width(config.vision_config)), np.float32)
    return tuple(
        {
            f"{modality}_{name}": jax.ShapeDtypeStruct((1, len(array) * rows, *array.shape[1:]), array.dtype)
            for name, array in model.arrange(config, square, (1, 1, 1)).items()
        }
        for modality, (fewest, most) in bounds.items()
        for rows in _steps(fewest, most)
    )


def _steps(fewest: int, most: int) -> list[int]:
    """What so many rows are padded to."""
    steps = [padded_rows(fewest)]
    while steps[-1] < most:
        steps.append(padded_rows(steps[-1] + 1))
    return steps


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many of the largest images as allowed, videos in the room that they leave, then padding to ``seq_len``.

    Raises:
      ConfigError: there is no room for them.
    """
    config: Any = ctx.get_hf_config()
    limits = image_limits(ctx)
    height, width = largest_image(limits)
    images = [Image.new("RGB", (width, height))] * mm_counts["image"]
    of_image = math.prod(squares_of(limits, (height, width)))
    room = seq_len - len(images) * of_image
    of_video, num_frames, size = largest_video(ctx, room // mm_counts["video"])
    if not of_video:
        raise ConfigError(
            f"{len(images)} image items of up to {of_image} tokens and {mm_counts['video']} video items do not fit in "
            f"{seq_len} tokens: lower max_pixels with mm_processor_kwargs, lower limit_mm_per_prompt, or raise "
            "max_model_len"
        )
    video = Video(frames=np.zeros((num_frames, *size, 3), np.uint8), timestamps=(LATEST_FRAME,) * num_frames)
    videos = [video] * mm_counts["video"]
    items = (config.image_token_id,) * len(images) + (config.video_token_id,) * len(videos)
    padding = (0,) * (room - len(videos) * of_video)
    return DummyData(prompt_token_ids=items + padding, multi_modal_data={"image": images, "video": videos})


# Items to arrays.


def map_images(ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
    """The arrays of ``arrange`` and the rows of each image, ``image_grid``, all with ``image_`` before their names.

    Raises:
      ConfigError: the image processor resizes to another size than its options say.
    """
    return MultiModalInputs.batch([_arrays(ctx, "image", *_cut_image(ctx, image)) for image in items])


def map_videos(ctx: InputContext, items: Sequence[Video]) -> MultiModalInputs:
    """The same for videos, with ``video_`` before the names."""
    return MultiModalInputs.batch([_arrays(ctx, "video", *_cut_video(ctx, video)) for video in items])


def _arrays(ctx: InputContext, modality: str, patches: np.ndarray, grid: Squares) -> MultiModalInputs:
    model: Any = model_class(ctx.model_config)
    arrays = model.arrange(ctx.get_hf_config(), patches, grid) | {"grid": np.array(grid, np.int32)}
    return MultiModalInputs({f"{modality}_{name}": array for name, array in arrays.items()})


def _cut_image(ctx: InputContext, image: Image.Image) -> tuple[np.ndarray, Squares]:
    config: Any = ctx.get_hf_config()
    features = image_processor(ctx.model_config)(images=[image], return_tensors=None)
    layers, *patches = features["image_grid_thw"][0].tolist()
    found = (layers, *(count // config.vision_config.spatial_merge_size for count in patches))
    if found != (expected := rows_of_image(ctx, (image.height, image.width))):
        raise ConfigError(
            f"the image processor made {found} layers, lines and columns of an image of {image.width} x {image.height} "
            f"pixels; its options say {expected}"
        )
    return features["pixel_values"], expected


def _cut_video(ctx: InputContext, video: Video) -> tuple[np.ndarray, Squares]:
    """Patches ``[patches, C * layer * p * p]``, layer after layer; the last frame stands for those that one lacks."""
    processor = image_processor(ctx.model_config)
    layer, side = processor.temporal_patch_size, processor.patch_size * processor.merge_size
    grid = rows_of_video(ctx, len(video), video.frames.shape[1:3])
    size = (grid[2] * side, grid[1] * side)
    frames = [*video.frames, *video.frames[-1:].repeat(-len(video) % layer, axis=0)]
    layers = []
    for first in range(0, len(frames), layer):
        resized = [Image.fromarray(frame).resize(size, processor.resample) for frame in frames[first : first + layer]]
        seen = processor(images=resized, do_resize=False, return_tensors=None)["pixel_values"]
        # Each is cut as an image, whose patches have the same frame ``layer`` times.
        seen = seen.reshape(layer, grid[1] * grid[2] * processor.merge_size**2, 3, layer, -1)[:, :, :, 0]
        layers.append(seen.transpose(1, 2, 0, 3).reshape(seen.shape[1], -1))
    return np.concatenate(layers), grid


def arrange(config, patches: Float[np.ndarray, "patches pixels"], grid: Squares) -> dict[str, np.ndarray]:
    """What the tower must know of the patches of an image or video, which stand square after square.

    Returns:
      ``patches``; ``positions``, line and column ``[patches, 2]``; and ``frames [patches, 2]``: a patch sees those of
      its own layer, from the first number up to the second.
    """
    layers, lines, columns = grid
    merge = config.vision_config.spatial_merge_size
    places = in_squares(np.indices((lines * merge, columns * merge), np.int32).transpose(1, 2, 0), merge)
    frames = segments(np.arange(layers + 1) * len(places))
    return {"patches": patches, "positions": np.tile(places, (layers, 1)), "frames": np.stack(frames, axis=-1)}


def in_squares(plane: Int[np.ndarray, "lines columns n"], merge: int) -> Int[np.ndarray, "patches n"]:
    """What stands in a plane of patches, square after square of ``merge`` x ``merge``."""
    lines, columns, n = plane.shape
    squares = plane.reshape(lines // merge, merge, columns // merge, merge, n).transpose(0, 2, 1, 3, 4)
    return squares.reshape(-1, n)


# Placeholders to tokens, and positions of tokens.


def expand_media(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<|image_pad|>`` becomes one for each row of its image, each ``<|video_pad|>`` the tokens of its video.

    Raises:
      RequestError: embeddings computed beforehand, whose lines and columns nobody knows; a video of too many tokens.
    """
    config: Any = ctx.get_hf_config()
    for modality, token, tokens_of in (
        ("image", config.image_token_id, _tokens_of_image),
        ("video", config.video_token_id, _tokens_of_video),
    ):
        items = inputs.multi_modal_data.get(modality, ())
        if any(map(embedding_rows, items)):
            raise RequestError(
                f"{modality} embeddings can't be taken: its rows' positions need lines and columns, which "
                f"embeddings do not tell; give the {modality} itself"
            )
        inputs = expand_items(inputs, modality, token, [tokens_of(ctx, item) for item in items])
    return inputs


def _tokens_of_image(ctx: InputContext, image: Image.Image) -> Tokens:
    return math.prod(rows_of_image(ctx, (image.height, image.width)))


def _tokens_of_video(ctx: InputContext, video: Video) -> Tokens:
    model: Any = model_class(ctx.model_config)
    num_frames, height, width, _ = video.frames.shape
    tokens = model.video_tokens(ctx, rows_of_video(ctx, num_frames, (height, width)), video)
    count = tokens if isinstance(tokens, int) else len(tokens)
    if count > (most := max_video_tokens(ctx)):
        raise RequestError(
            f"a video of {num_frames} frames of {width} x {height} pixels takes {count} tokens, at most {most} are "
            "supported here: give fewer frames, or raise max_model_len"
        )
    return tokens


def prompt_positions(
    config,
    token_ids: Int[np.ndarray, " T"],
    media: Sequence[PlacedItem],
    *,
    time_step: Callable[[Any, PlacedItem], float] = lambda config, item: 1.0,
) -> Int[np.ndarray, "3 T"]:
    """Positions of time, line and column.

    Tokens of text have the same on all axes, and count on from what stands before. Rows count each axis from there:
    ``time_step`` is what layers are apart. As in Hugging Face's ``get_rope_index``, text behind rows goes on behind
    their last line or column, whichever is farther, and does not ask how far their time went.
    """
    positions = np.empty((3, len(token_ids)), np.int64)
    done = following = 0
    for start, block in _blocks_of_rows(config, media, time_step):
        stop = start + block.shape[1]
        positions[:, done:start] = following + np.arange(start - done)
        following += start - done
        positions[:, start:stop] = following + block
        following += block[1:].max() + 1
        done = stop
    positions[:, done:] = following + np.arange(len(token_ids) - done)
    return positions


def _blocks_of_rows(config, media: Sequence[PlacedItem], time_step) -> Iterator[tuple[int, Int[np.ndarray, "3 rows"]]]:
    """Where rows stand without text between them, and their positions among themselves."""
    for item in media:
        assert item.mm_kwargs is not None, "embeddings are refused where placeholders are expanded"
        layers, lines, columns = item.mm_kwargs[f"{item.modality}_grid"][0].tolist()
        is_row = np.ones(item.placeholder.length, bool) if item.placeholder.is_row is None else item.placeholder.is_row
        spans = runs(np.asarray(is_row))
        block = np.indices((layers // len(spans), lines, columns)).reshape(3, -1)
        block[0] = (block[0].astype(np.float32) * np.float32(time_step(config, item))).astype(int)
        yield from ((item.placeholder.offset + start, block) for start, _ in spans)


# The model.


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


def patch_width(vision: Any) -> int:
    """Numbers of a flattened patch."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


class FlatPatchEmbed(PatchEmbed):
    """A convolution over patches that are cut out and flattened already; checkpoints store ``(D, C, layer, p, p)``."""

    def __init__(self, vision, *, use_bias: bool, dtype, rngs: nnx.Rngs):
        layer, p, width = vision.temporal_patch_size, vision.patch_size, tower_width(vision)
        super().__init__(vision.in_channels * layer, p, width, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.conv_shape = (width, vision.in_channels, layer, p, p)

    def __call__(self, patches: Float[Array, "B T pixels"]) -> Float[Array, "B T D"]:
        """Rows of patches."""
        x = patches.astype(self.kernel[...].dtype) @ self.kernel[...]
        return x if self.bias is None else x + self.bias[...][None, None]


class VisionPatchEmbed(nnx.Module):
    """Patches to hidden states."""

    def __init__(self, vision, *, use_bias: bool, dtype, rngs: nnx.Rngs):
        self.proj = FlatPatchEmbed(vision, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "B T pixels"]) -> Float[Array, "B T D"]:
        """As `FlatPatchEmbed`."""
        return self.proj(patches)


class VisionAttention(nnx.Module):
    """Self-attention of patches, with heads turned by line and column, within the intervals that are given."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        width, kw = tower_width(config), {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.qkv = nnx.Linear(width, 3 * width, **kw)
        self.proj = nnx.Linear(width, width, **kw)

    def __call__(self, x: Float[Array, "B T D"], rotary: RotaryTable, intervals: RowIntervals) -> Float[Array, "B T D"]:
        """Attention of each item's patches."""
        B, T, D = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(B, T, 3, self.num_heads, -1), 2, 0)
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


def layer_norm(width: int, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm; two passes for the variance, since one loses digits that parity needs."""
    kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
    return nnx.LayerNorm(width, epsilon=EPSILON, use_fast_variance=False, **kw)


class VisionBlock(nnx.Module):
    """Attention and feed-forward, each after a norm and added to what came in."""

    norm: ClassVar[Callable[..., nnx.Module]] = staticmethod(layer_norm)
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

    norm: ClassVar[Callable[..., nnx.Module]] = staticmethod(layer_norm)

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
            inputs_embeds = self.embed_input_ids(input_ids)
            tokens = {"image": self.config.image_token_id, "video": self.config.video_token_id}
            for modality, rows in self.embed_multimodal(**mm_kwargs).items():
                is_row = input_ids == tokens[modality]
                inputs_embeds = merge_multimodal_embeddings(inputs_embeds, is_row, jnp.concatenate(list(rows)))
        return self.model(inputs_embeds, positions, kv_caches, attn_metadata)
