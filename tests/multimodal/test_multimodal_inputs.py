"""Keyword arrays: joining and parting items, and what the caller keeps."""

import chex
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aphrodite_jax.errors import RegistrationError, RequestError
from aphrodite_jax.multimodal import MultiModalInputs
from aphrodite_jax.multimodal.mapped_items import MappedItems, num_bytes

DTYPES = [np.float32, np.int32, np.uint8, np.bool_, np.float16, ml_dtypes.bfloat16]

arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
values = st.recursive(arrays, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@st.composite
def items(draw, value=values):
    """Inputs of a few items, all with the same keywords."""
    keywords = draw(st.lists(st.sampled_from(["pixel_values", "image_sizes", "mask"]), min_size=1, unique=True))
    item = st.fixed_dictionaries(dict.fromkeys(keywords, value))
    return draw(st.lists(item, min_size=1, max_size=4))


def leaves(value) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    return [leaf for element in value for leaf in leaves(element)]


def flat(value) -> list[tuple]:
    """Every number of every leaf, with its dtype, in order."""
    return [(leaf.dtype, x) for leaf in leaves(value) for x in leaf.ravel().tolist()]


@settings(deadline=None, max_examples=30)
@given(items())
def test_batches_of_split_batches_are_the_same(given_items):
    batch = MultiModalInputs.batch([MultiModalInputs(item) for item in given_items])
    assert batch.num_items == len(given_items)
    parts = batch.split()
    assert len(parts) == len(given_items)
    assert MultiModalInputs.batch(parts) == batch


@settings(deadline=None, max_examples=30)
@given(items())
def test_batching_keeps_every_number_in_order(given_items):
    batch = MultiModalInputs.batch([MultiModalInputs(item) for item in given_items])
    for keyword in given_items[0]:
        assert flat(batch[keyword]) == [number for item in given_items for number in flat(item[keyword])]


@settings(deadline=None, max_examples=30)
@given(items(arrays))
def test_splitting_gives_back_the_arrays(given_items):
    inputs = [MultiModalInputs(item) for item in given_items]
    assert list(MultiModalInputs.batch(inputs).split()) == inputs


@settings(deadline=None, max_examples=30)
@given(items())
def test_the_callers_data_do_not_change(given_items):
    before = repr(given_items)
    flags = [leaf.flags.writeable for item in given_items for value in item.values() for leaf in leaves(value)]
    batch = MultiModalInputs.batch([MultiModalInputs(item) for item in given_items])
    assert repr(given_items) == before
    assert all(flags)
    for item in given_items:
        for value in item.values():
            assert all(leaf.flags.writeable for leaf in leaves(value))
    for value in batch.values():
        for leaf in leaves(value):
            assert not leaf.flags.writeable


def test_batching_at_every_level_of_nesting():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(15.0).reshape(5, 3)
    equal = MultiModalInputs.batch([MultiModalInputs({"x": a}), MultiModalInputs({"x": a})])
    chex.assert_trees_all_equal(equal["x"], np.stack([a, a]))
    ragged = MultiModalInputs.batch([MultiModalInputs({"x": a}), MultiModalInputs({"x": b})])
    assert isinstance(ragged["x"], tuple)
    chex.assert_trees_all_equal(ragged["x"], (a, b))
    nested = MultiModalInputs.batch([MultiModalInputs({"x": [a[0], a[1]]}), MultiModalInputs({"x": [b[0], b[1]]})])
    chex.assert_trees_all_equal(nested["x"], np.stack([a, b[:2]]))
    uneven = MultiModalInputs.batch([MultiModalInputs({"x": [a[0], a[1]]}), MultiModalInputs({"x": [b[0]]})])
    chex.assert_trees_all_equal(uneven["x"], (a, b[:1]))  # both of the first item are there
    deep = MultiModalInputs.batch([MultiModalInputs({"x": [a, b]}), MultiModalInputs({"x": [a, b]})])
    chex.assert_trees_all_equal(deep["x"], ((a, b), (a, b)))


def test_arrays_of_other_dtypes_are_not_promoted():
    batch = MultiModalInputs.batch([MultiModalInputs({"x": np.zeros(2, d)}) for d in (np.float32, np.int32)])
    assert [value.dtype for value in batch["x"]] == [np.float32, np.int32]


def test_jax_arrays_are_taken():
    import jax.numpy as jnp

    inputs = MultiModalInputs({"x": jnp.ones((1, 2), jnp.bfloat16)})
    assert type(inputs["x"]) is np.ndarray
    assert inputs["x"].dtype == ml_dtypes.bfloat16


def test_it_is_an_immutable_mapping():
    array = np.zeros((1, 2))
    inputs = MultiModalInputs({"x": array, "y": [1, 2]})
    with pytest.raises(TypeError):
        inputs["x"] = array
    with pytest.raises(ValueError, match="read-only"):
        inputs["x"][0, 0] = 1
    array[0, 0] = 3  # the caller's own array is free
    assert dict(**inputs).keys() == {"x", "y"}
    assert len(inputs) == 2
    assert "z" not in inputs
    with pytest.raises(TypeError, match="unhashable"):
        hash(inputs)
    assert repr(inputs) == "MultiModalInputs(x: float64[1, 2], y: (int64[], int64[]))"
    assert MultiModalInputs() == MultiModalInputs({})
    assert MultiModalInputs({"x": np.zeros(2)}) != MultiModalInputs({"x": np.zeros(2, np.float32)})
    assert MultiModalInputs({"x": np.zeros(1)}) != MultiModalInputs({"x": [np.zeros(())]})
    assert MultiModalInputs({"x": np.zeros(1)}) != {"x": np.zeros(1)}


@pytest.mark.parametrize("keyword", ["", "pixel values", "2nd", 3, None])
def test_a_keyword_is_a_name(keyword):
    with pytest.raises(RegistrationError, match="a keyword of __call__ is a name"):
        MultiModalInputs({keyword: np.zeros(1)})


@pytest.mark.parametrize(
    "value",
    [
        "text",
        None,
        object(),
        {"a": 1},
        np.array(["a"]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, "V4"),
        [np.zeros(1), "text"],
    ],
)
def test_values_are_number_arrays(value):
    with pytest.raises(RegistrationError, match="pixels: number arrays are expected, got"):
        MultiModalInputs({"pixels": value})


def test_items_of_other_keywords_are_not_batched():
    a, b = MultiModalInputs({"x": np.zeros(1)}), MultiModalInputs({"x": np.zeros(1), "y": np.zeros(1)})
    for pair in ([a, b], [b, a]):
        with pytest.raises(RequestError, match="items that are batched have the same keywords"):
            MultiModalInputs.batch(pair)


def test_values_that_do_not_agree_on_their_items_are_not_split():
    for arrays in ({"x": np.zeros(2), "y": np.zeros(3)}, {"x": np.zeros(())}, {"x": np.zeros(1), "y": 3}):
        with pytest.raises(RegistrationError, match="axis 0 of every array is the items"):
            MultiModalInputs(arrays).split()


def test_no_items():
    assert MultiModalInputs.batch([]) == MultiModalInputs()
    assert MultiModalInputs().split() == ()
    assert MultiModalInputs().num_items == 0


def test_kept_items_are_dropped_by_age_within_their_bytes():
    def inputs(size):
        return MultiModalInputs({"x": np.zeros(size, np.uint8), "y": [np.zeros(0, np.uint8)]})

    kept = MappedItems(capacity=100)
    assert num_bytes(inputs(40)) == 40
    for name in "abc":
        kept.put((name,), inputs(30))
    assert kept.get(("a",)) is not None  # used last, so b is the oldest
    kept.put(("d",), inputs(30))
    assert [name for name in "abcd" if kept.get((name,)) is None] == ["b"]
    kept.put(("e",), inputs(101))
    assert kept.get(("e",)) is None
    assert kept.get(("d",)) is not None
    kept.put(("f",), inputs(100))
    assert [name for name in "abcdef" if kept.get((name,)) is not None] == ["f"]
