"""hypothesis strategies: what users give a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax.multimodal import Video

__all__ = ["Request", "images", "requests", "videos"]

Request = tuple[tuple[int, ...], dict[str, list[Any]]]
"""Token ids of a prompt with one placeholder an item, and the items by modality."""


@st.composite
def images(draw, *, least: int = 1, most: int = 300, modes: Sequence[str] = ("RGB",)) -> Image.Image:
    """Pictures of noise, of every height and width from ``least`` to ``most`` pixels; smaller ones are simpler."""
    width, height = draw(st.integers(least, most)), draw(st.integers(least, most))
    noise = np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(draw(st.sampled_from(list(modes))))


@st.composite
def videos(draw, *, most_frames: int = 8, least: int = 1, most: int = 64) -> Video:
    """Videos of noise, with times or without."""
    frames, height, width = draw(st.integers(1, most_frames)), *(draw(st.integers(least, most)) for _ in range(2))
    noise = np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, 256, (frames, height, width, 3), np.uint8)
    fps = draw(st.none() | st.sampled_from([0.5, 2.0, 30.0]))
    return Video(frames=noise, timestamps=None if fps is None else tuple((np.arange(frames) / fps).tolist()))


@st.composite
def requests(
    draw,
    items: Mapping[str, st.SearchStrategy],
    placeholders: Mapping[str, int],
    tokens: Sequence[int],
    *,
    most: int = 2,
) -> Request:
    """Prompts of up to twelve ``tokens`` with up to ``most`` items of each modality among them."""
    prompt = draw(st.lists(st.sampled_from(list(tokens)), min_size=1, max_size=12))
    media = {}
    for modality, strategy in items.items():
        media[modality] = draw(st.lists(strategy, max_size=most))
        for _ in media[modality]:
            prompt.insert(draw(st.integers(0, len(prompt))), placeholders[modality])
    return tuple(prompt), {modality: given for modality, given in media.items() if given}
