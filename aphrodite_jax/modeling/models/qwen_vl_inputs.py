"""Images and videos of the Qwen-VL family: sizes, shapes, patches, tokens and positions.

`qwen2_vl` tells how an image becomes tokens. All sizes of images come down to a few shapes: `pad_media` puts squares
behind an image that see nothing and are not seen. What Qwen2.5-VL and Qwen3-VL do otherwise are the static methods
``arrange``, ``frame_limits``, ``video_tokens`` and ``num_text_tokens`` of the model class, which these functions call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import transformers
from jaxtyping import Float, Int
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError, RequestError
from aphrodite_jax.inputs import (
    DummyData,
    InputContext,
    LLMInputs,
    PlacedItem,
    expand_items,
)
from aphrodite_jax.inputs.placeholders import Tokens
from aphrodite_jax.multimodal import MultiModalInputs, Video, embedding_rows
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor
from aphrodite_jax.multimodal.shapes import next_step
from aphrodite_jax.multimodal.video import frame_sampling, video_processor_options
from kernels_pallas.intervals import runs, segments

__all__ = [
    "PixelLimits",
    "Squares",
    "VideoLimits",
    "arrange",
    "dummy_data",
    "expand_media",
    "frame_limits",
    "image_limits",
    "in_squares",
    "largest_image",
    "largest_video",
    "map_images",
    "map_videos",
    "max_image_tokens",
    "max_video_tokens",
    "media_shapes",
    "most_rows",
    "pad_media",
    "padded_rows",
    "patch_width",
    "prompt_positions",
    "rows_of_image",
    "rows_of_video",
    "square_grid",
    "squares_of",
    "video_limits",
]


MOST_NARROW = 200
"""Times that a side of an image may be longer than the other at most."""
FEWEST_ROWS = 16
"""Shapes of fewer are not worth a program."""
LATEST_FRAME = 99_999.9
"""Seconds from a video's start at which the longest text of a time is expected."""

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
    return next_step(max(rows, FEWEST_ROWS))


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


def patch_width(vision: Any) -> int:
    """Numbers of a flattened patch."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
