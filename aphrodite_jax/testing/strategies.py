"""Hypothesis strategies: items as users give them, prompts with items among their tokens, masks, and arrivals.

They serve the clauses of `check_multimodal_model` and tests of an author's own. Smaller examples are simpler ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax.multimodal import Video
from kernels_pallas.intervals import RowIntervals, bidirectional_spans, causal, prefix

__all__ = ["IMAGE_MODES", "Arrival", "Request", "arrivals", "images", "requests", "row_intervals", "spans", "videos"]

Request = tuple[tuple[int, ...], dict[str, list[Any]]]
"""Token ids of a prompt with one placeholder an item, and the items by modality."""
Arrival = tuple[int, Request]
"""Steps of the engine that a request comes after the one before, and the request."""

BANDS = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2, "RGBX": 4, "CMYK": 4, "YCbCr": 3, "LAB": 3, "HSV": 3}
WIDE = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
IMAGE_MODES = (*BANDS, "P", "PA", "1", "I", "F", *WIDE)
"""Pillow's modes of images that users may give, the simplest first."""
EXIF_ORIENTATION = 0x0112


@st.composite
def images(
    draw, *, least: int = 1, most: int = 300, modes: Sequence[str] = IMAGE_MODES, turned: bool = True
) -> Image.Image:
    """Pictures of noise, now and then of one colour.

    Args:
      least, most: pixels of each side, as stored.
      modes: of Pillow, the simplest first.
      turned: whether some have an EXIF orientation, so that they are to be turned or mirrored before they are used.
    """
    width, height = draw(st.integers(least, most)), draw(st.integers(least, most))
    mode = draw(st.just(modes[0]) | st.sampled_from(list(modes)))
    pixels = _noise(draw, (height, width, 4))
    image = _in_mode(mode, np.broadcast_to(pixels[:1, :1], pixels.shape) if _seldom(draw) else pixels)
    if turned and (orientation := draw(st.sampled_from([1, 1, *range(2, 9)]))) > 1:
        image.getexif()[EXIF_ORIENTATION] = orientation
    return image


def _in_mode(mode: str, pixels: np.ndarray) -> Image.Image:
    """An image of numbers ``[height, width, 4]``."""
    height, width, _ = pixels.shape
    if mode in BANDS:
        return Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels[..., : BANDS[mode]]).tobytes())
    grey = pixels[..., 0]
    if mode in WIDE:
        return Image.frombytes(mode, (width, height), (grey.astype(np.uint16) * 257).astype(WIDE[mode]).tobytes())
    if mode == "1":
        return Image.fromarray(grey > 127)
    if mode in ("I", "F"):
        return Image.fromarray(grey.astype({"I": np.int32, "F": np.float32}[mode]))
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    if mode in ("P", "PA"):
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        image.info["transparency"] = int(np.asarray(image)[0, 0])
    return image.convert("PA") if mode == "PA" else image.convert(mode)


@st.composite
def videos(draw, *, least_frames: int = 1, most_frames: int = 8, least: int = 1, most: int = 64) -> Video:
    """Videos of noise, with times or without; ``least`` and ``most`` are the pixels of each side."""
    frames = draw(st.integers(least_frames, most_frames))
    height, width = draw(st.integers(least, most)), draw(st.integers(least, most))
    fps = draw(st.none() | st.sampled_from([0.5, 2.0, 30.0]))
    times = None if fps is None else tuple((np.arange(frames) / fps).tolist())
    return Video(frames=_noise(draw, (frames, height, width, 3)), timestamps=times)


@st.composite
def requests(
    draw,
    items: Mapping[str, st.SearchStrategy],
    placeholders: Mapping[str, int],
    tokens: Sequence[int],
    *,
    fewest: int = 0,
    most: int = 2,
    most_tokens: int = 12,
) -> Request:
    """Prompts of text with placeholders among it, each of which stands for an item, as before they are processed.

    Args:
      items: modality to a strategy of items, `images` say.
      placeholders: modality to the token that stands for an item.
      tokens: of the text.
      fewest, most: items of each modality.
      most_tokens: of text, of which there is one at least.
    """
    prompt = draw(st.lists(st.sampled_from(list(tokens)), min_size=1, max_size=most_tokens))
    media = {}
    for modality, strategy in items.items():
        media[modality] = draw(st.lists(strategy, min_size=fewest, max_size=most))
        for _ in media[modality]:
            prompt.insert(draw(st.integers(0, len(prompt))), placeholders[modality])
    return tuple(prompt), {modality: given for modality, given in media.items() if given}


def arrivals(requests: st.SearchStrategy[Request], *, most: int = 3) -> st.SearchStrategy[list[Arrival]]:
    """Schedules: up to ``most`` requests, each so many steps of the engine after the one before, or along with it."""
    return st.lists(st.tuples(st.integers(0, 4), requests), min_size=1, max_size=most)


@st.composite
def spans(draw, length: int, *, most: int = 3) -> list[tuple[int, int]]:
    """Up to ``most`` runs ``[begin, end)`` of a prompt of ``length`` tokens, in order and with a token between."""
    edges = sorted(draw(st.sets(st.integers(0, length), max_size=2 * most)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@st.composite
def row_intervals(draw, length: int) -> RowIntervals:
    """Masks of a prompt: causal, with a window or without, with spans that see themselves, or as a prefix-LM's."""
    rows = causal(length, window=draw(st.none() | st.integers(1, length)))
    rows = bidirectional_spans(rows, draw(spans(length)), clamp_start=draw(st.booleans()))
    return prefix(rows, draw(st.sampled_from([0, 0, *range(length + 1)])))


def _noise(draw, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, 256, shape, np.uint8)


def _seldom(draw) -> bool:
    return draw(st.integers(0, 7)) == 7
