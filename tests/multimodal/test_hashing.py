"""Content hashes: equal for equal content, and different for all else."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax.multimodal import content_hash

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=5,
)


def canonical(value):
    """Equal exactly where the hash should be: types count, lists and tuples do not, nor does the order of keys."""
    if isinstance(value, list | tuple):
        return ("sequence", tuple(canonical(element) for element in value))
    if isinstance(value, dict):
        return ("mapping", frozenset((key, canonical(element)) for key, element in value.items()))
    return (type(value).__name__, repr(value))


@settings(deadline=None, max_examples=30)
@given(plain, plain)
def test_plain_values_are_told_apart(a, b):
    assert (content_hash(a) == content_hash(b)) == (canonical(a) == canonical(b))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=3), max_size=4), st.lists(st.text(max_size=3), max_size=4))
def test_texts_do_not_run_together(a, b):
    assert (content_hash(a) == content_hash(b)) == (a == b)


def picture(mode: str, shift: int = 0) -> Image.Image:
    image = Image.new(mode, (3, 2))
    if mode == "P":
        image.putpalette([shift] * 3 + [9] * 765)
    return image


def different() -> list:
    """No two are alike."""
    transparent, other = picture("P"), picture("P")
    transparent.info["transparency"], other.info["transparency"] = 0, 1
    return [
        picture("RGB"),
        picture("L"),
        picture("RGBA"),
        picture("P"),
        picture("P", 1),
        transparent,
        other,
        picture("RGB").resize((2, 3)),
        Image.new("RGB", (3, 2), "white"),
        np.zeros((2, 3), np.uint8),
        np.zeros((3, 2), np.uint8),
        np.zeros((2, 3), np.int8),
        np.zeros(6, np.uint8),
        np.zeros((2, 3), np.float16),
        np.zeros((2, 3), ml_dtypes.bfloat16),
        (np.zeros(4, np.float32), 16000),
        (np.zeros(4, np.float32), 8000),
        bytes(6),
        "",
        0,
        0.0,
        False,
        None,
        [],
        {},
    ]


def test_no_two_items_of_other_content_are_alike():
    hashes = [content_hash(item) for item in different()]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [content_hash(item) for item in different()]  # nor does identity count
    assert all(len(name) == 64 for name in hashes)


def test_options_count():
    names = [content_hash("x", options) for options in ({}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1})]
    assert len(set(names)) == len(names)
    assert content_hash("x", {"a": 1, "b": 2}) == content_hash("x", {"b": 2, "a": 1})
    assert content_hash("x") == content_hash("x", {})


def test_views_hash_as_what_they_show():
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert content_hash(array[::2, ::3]) == content_hash(array[::2, ::3].copy())
    assert content_hash(array.T) == content_hash(np.ascontiguousarray(array.T))
    assert content_hash(array.T) != content_hash(array)


@pytest.mark.parametrize("item", [object(), {1, 2}, [object()], lambda: None])
def test_content_that_cannot_be_known(item):
    with pytest.raises(TypeError, match="content_hash takes images, arrays and plain values, got"):
        content_hash(item)


def test_one_pixel_is_enough():
    base = np.zeros((8, 8, 3), np.uint8)
    changed = []
    for index in itertools.product((0, 7), (0, 7), (0, 2)):
        array = base.copy()
        array[index] = 1
        changed.append(content_hash(Image.fromarray(array)))
    assert len({content_hash(Image.fromarray(base)), *changed}) == 9
