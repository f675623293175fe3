"""Bounds of blocks against the mask itself, block by block, on the host and on the device."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import EDGES, draw_intervals, mask_of, seeds

from kernels_pallas import intervals
from kernels_pallas.block_bounds import block_bounds, row_block_bounds

# T, S, block_q, block_k: whole blocks, a rest in rows, in keys, in both, one block of all, blocks of one.
GEOMETRIES = [
    (16, 24, 4, 8),
    (17, 24, 4, 8),
    (16, 21, 8, 4),
    (19, 23, 5, 7),
    (9, 7, 16, 16),
    (6, 5, 1, 1),
    (1, 9, 3, 2),
]
ON_DEVICE = GEOMETRIES[3:5]
geometries = st.sampled_from(GEOMETRIES)
kinds = st.sampled_from(EDGES)
flags = st.booleans()


def rows_of(kind, seed, T, S):
    """Intervals ``[2, T]``; of some draws no row is empty, or few are, so that free blocks come up."""
    rng = np.random.default_rng(seed)
    if seed % 3:
        return draw_intervals(rng, kind, 2, T, S)
    cuts = rng.integers(0, S + 1, (2, 2, 1))
    spread = rng.integers(0, 4, (2, 2, T))
    start, stop = np.clip(cuts.min(0) - spread[0], 0, S), np.clip(cuts.max(0) + spread[1], 0, S)
    if seed % 2:
        empty = rng.random((2, T)) < 0.2
        start, stop = np.where(empty, rng.integers(stop.min(), S + 1), start), np.where(empty, stop.min(), stop)
    return start.astype(np.int32), stop.astype(np.int32)


def hull(flags) -> tuple[int, int]:
    """First and past-the-last index that is true; (0, 0) where none is."""
    where = np.flatnonzero(flags)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def expected_blocks(mask, block_q, block_k, ignore_padding, ignore_empty):
    """Per row block: the hull of the key blocks seen, and which key blocks every row sees whole."""
    T, S = mask.shape
    hulls, free = [], []
    for a in range(0, T, block_q):
        rows = mask[a : a + block_q]
        if not ignore_padding and not ignore_empty and len(rows) < block_q:
            rows = np.concatenate([rows, np.zeros((block_q - len(rows), S), bool)])
        counted = rows[rows.any(axis=1)] if ignore_empty else rows
        blocks = [rows[:, b : b + block_k] for b in range(0, S, block_k)]
        hulls.append(hull([block.any() for block in blocks]))
        wholes = [counted[:, b : b + block_k] for b in range(0, S, block_k)]
        free.append([bool(len(x)) and x.shape[1] == block_k and bool(x.all()) for x in wholes])
    return hulls, free


@cache
def jitted(function, **options):
    return jax.jit(partial(function, **options))


@given(geometries, kinds, seeds, flags, flags)
@settings(max_examples=60, deadline=None)
def test_kernels_block_bounds_equal_the_mask(geometry, kind, seed, ignore_padding, ignore_empty):
    T, S, block_q, block_k = geometry
    start, stop = rows_of(kind, seed, T, S)
    options = {"ignore_padding": ignore_padding, "ignore_empty": ignore_empty}
    bounds = block_bounds(start, stop, block_q=block_q, block_k=block_k, **options)
    num_blocks = -(-T // block_q)
    for x in bounds:
        assert isinstance(x, np.ndarray)
        chex.assert_shape(x, (2, num_blocks))
        chex.assert_type(x, np.int32)
    for b, mask in enumerate(mask_of(start, stop, S)):
        hulls, free = expected_blocks(mask, block_q, block_k, **options)
        for i in range(num_blocks):
            first, last, free_first, free_last = (int(x[b, i]) for x in bounds)
            assert (first, last) == hulls[i]
            assert first <= free_first <= free_last <= last
            assert [free_first <= j < free_last for j in range(len(free[i]))] == free[i]
            assert free_first < free_last or free_first == last
    if geometry in ON_DEVICE:
        on_device = jitted(block_bounds, block_q=block_q, block_k=block_k, **options)(start, stop)
        assert all(isinstance(x, jax.Array) for x in on_device)
        chex.assert_trees_all_equal(on_device, bounds)


@given(geometries, kinds, seeds)
@settings(max_examples=60, deadline=None)
def test_kernels_row_block_bounds_equal_the_mask(geometry, kind, seed):
    T, S, block_q, block_k = geometry
    start, stop = rows_of(kind, seed, T, S)
    options = {"block_q": block_q, "block_k": block_k, "num_keys": S}
    bounds = row_block_bounds(start, stop, **options)
    for x in bounds:
        assert isinstance(x, np.ndarray)
        chex.assert_shape(x, (2, -(-S // block_k)))
        chex.assert_type(x, np.int32)
    for b, mask in enumerate(mask_of(start, stop, S)):
        expected = [
            hull([mask[i : i + block_q, j : j + block_k].any() for i in range(0, T, block_q)])
            for j in range(0, S, block_k)
        ]
        assert list(zip(*(x[b].tolist() for x in bounds), strict=True)) == expected
    if geometry in ON_DEVICE:
        on_device = jitted(row_block_bounds, **options)(start, stop)
        assert all(isinstance(x, jax.Array) for x in on_device)
        chex.assert_trees_all_equal(on_device, bounds)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_kernels_block_bounds_take_any_leading_axes(batch, array):
    start, stop = draw_intervals(np.random.default_rng(0), "random", 6, 11, 13)
    cut = int(np.prod(batch))
    several = [array(x[:cut].reshape(*batch, 11)) for x in (start, stop)]
    for function, options in ((block_bounds, {}), (row_block_bounds, {"num_keys": 13})):
        options |= {"block_q": 4, "block_k": 5}
        together = (jitted if array is jnp.asarray else partial)(function, **options)(*several)
        one_by_one = [function(start[i], stop[i], **options) for i in range(cut)]
        for x, y in zip(together, zip(*one_by_one, strict=True), strict=True):
            np.testing.assert_array_equal(np.asarray(x).reshape(cut, -1), np.stack(y))


def test_kernels_block_bounds_of_a_causal_mask():
    """By hand: 8 rows in blocks of 4, 8 keys in blocks of 2."""
    bounds = block_bounds(*intervals.causal(8), block_q=4, block_k=2)
    assert [x.tolist() for x in bounds] == [[0, 0], [2, 4], [2, 0], [2, 2]]
    backward = row_block_bounds(*intervals.causal(8), block_q=4, block_k=2, num_keys=8)
    assert [x.tolist() for x in backward] == [[0, 0, 1, 1], [2, 2, 2, 2]]


def test_kernels_block_bounds_of_padding():
    """577 patches in blocks of 64 rows: the last block holds one row, and is free only where padding may be ignored."""
    rows = intervals.full(577)
    kept = block_bounds(*rows, block_q=64, block_k=64)
    ignored = block_bounds(*rows, block_q=64, block_k=64, ignore_padding=True)
    assert kept.free_last.tolist() == [9] * 9 + [10]
    assert kept.free_first.tolist() == [0] * 9 + [10]
    assert ignored.free_last.tolist() == [9] * 10
    assert ignored.free_first.tolist() == [0] * 10
    np.testing.assert_array_equal(kept.last, [10] * 10)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_kernels_block_bounds_of_nothing(array):
    none = array(np.zeros((2, 0), np.int32))
    call = jitted if array is jnp.asarray else partial
    assert [x.shape for x in call(block_bounds, block_q=4, block_k=4)(none, none)] == [(2, 0)] * 4
    by_key = call(row_block_bounds, block_q=4, block_k=4, num_keys=9)(none, none)
    chex.assert_trees_all_equal(by_key, type(by_key)(*[np.zeros((2, 3), np.int32)] * 2))
    row = array(np.zeros((2, 3), np.int32))
    by_key = call(row_block_bounds, block_q=4, block_k=4, num_keys=0)(row, row)
    assert [x.shape for x in by_key] == [(2, 0)] * 2


def test_kernels_block_bounds_near_the_largest_int():
    """No block index overflows for keys near 2**31."""
    top = 2**31 - 1
    start, stop = np.int32([top - 600, top - 500]), np.int32([top, top - 1])
    bounds = block_bounds(start, stop, block_q=2, block_k=128)
    expected = [(top - 600) // 128, -(-top // 128), -(-(top - 500) // 128), (top - 1) // 128]
    assert [int(x[0]) for x in bounds] == expected
    chex.assert_trees_all_equal(jitted(block_bounds, block_q=2, block_k=128)(start, stop), bounds)


@pytest.mark.parametrize("function", [block_bounds, partial(row_block_bounds, num_keys=4)])
def test_kernels_block_bounds_errors_say_what_is_wrong(function):
    good = np.zeros((2, 4), np.int32)
    for options in ({"block_q": 0, "block_k": 2}, {"block_q": 2, "block_k": -1}):
        with pytest.raises(ValueError, match=f"got {options['block_q']} rows and {options['block_k']} keys"):
            function(good, good, **options)
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(4,\)"):
        function(good, good[0], block_q=2, block_k=2)
    with pytest.raises(ValueError, match="int32 and int64"):
        function(good, good.astype(np.int64), block_q=2, block_k=2)
