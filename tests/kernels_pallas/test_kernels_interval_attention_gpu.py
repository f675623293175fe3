"""The GPU kernels of dense attention against the reference: on a GPU where there is one, else as plain JAX."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from kernels_cases import COMPILE_FAST, ON_GPU

from kernels_pallas import interval_attention, intervals
from kernels_pallas.interval_attention import pallas_gpu

pytestmark = pytest.mark.once

SMALL = pallas_gpu.Blocks(rows=16, keys=16, warps=4, stages=1)
"""Many blocks in short sequences."""


def _normal(seed, shape, dtype):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _mask(mask: intervals.RowIntervals, batch=1):
    return tuple(np.ascontiguousarray(np.broadcast_to(x, (batch, len(x))), np.int32) for x in mask)


@functools.partial(jax.jit, static_argnames=("soft_cap", "scale", "blocks"), compiler_options=COMPILE_FAST)
def _kernels(q, k, v, start, stop, d_out, d_lse, *, scale, soft_cap, blocks):
    """Output, log-sums and gradients by q, k and v."""
    arguments = {"scale": scale, "soft_cap": soft_cap, "interpret": not ON_GPU}
    out, lse = pallas_gpu.forward(q, k, v, start, stop, blocks=blocks, **arguments)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    gradients = pallas_gpu.backward(q, k, v, start, stop, lse, delta, d_out, d_query=blocks, d_key=blocks, **arguments)
    return out, lse, *gradients


def _log_sums(q, k, start, stop, *, scale, soft_cap):
    """Log-sums of the reference, ``[B, T, N]``; 0 for a row that sees no key."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->btns", q, k, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None]
    seen = (start[:, :, None, None] <= keys) & (keys < stop[:, :, None, None])
    seen = jnp.broadcast_to(seen, scores.shape)
    return jax.nn.logsumexp(jnp.where(seen, scores, 0.0), axis=-1, where=seen.any(axis=-1, keepdims=True) & seen)


@functools.partial(jax.jit, static_argnames=("soft_cap", "scale"), compiler_options=COMPILE_FAST)
def _reference(q, k, v, start, stop, d_out, d_lse, *, scale, soft_cap):
    """The same from the reference, in float32."""
    arguments = {"scale": scale, "soft_cap": soft_cap}
    q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))

    def function(q, k, v):
        out = interval_attention(q, k, v, start, stop, implementation="reference", **arguments)
        lse = _log_sums(q, k, start, stop, **arguments)
        return out, jnp.where((stop > start)[:, :, None], lse, 0.0)

    (out, lse), pull = jax.vjp(function, q, k, v)
    return out, lse, *pull((d_out, d_lse))


def _poison(x, where):
    return np.where(where[:, :, None, None], np.asarray(np.nan, x.dtype), x)


def _check(shape, mask, dtype=np.float32, soft_cap=None, blocks=SMALL, seed=0, scale=None):
    """Kernels on poisoned inputs against the reference on clean ones, ``shape`` being (T, S, N, K, H)."""
    T, S, N, K, H = shape
    start, stop = mask
    B = start.shape[0]
    q, d_out = _normal(seed, (B, T, N, H), dtype), _normal(seed + 1, (B, T, N, H), dtype)
    k, v = _normal(seed + 2, (B, S, K, H), dtype), _normal(seed + 3, (B, S, K, H), dtype)
    empty = stop <= start
    d_lse = np.where(empty[:, :, None], np.float32(0), _normal(seed + 4, (B, T, N), np.float32))
    keys = np.arange(S)
    unused = ~((start[:, :, None] <= keys) & (keys < stop[:, :, None])).any(axis=1)
    arguments = {"scale": H**-0.5 if scale is None else scale, "soft_cap": soft_cap}
    wanted = jax.device_get(_reference(q, k, v, start, stop, d_out, d_lse, **arguments))
    poisoned = _poison(q, empty), _poison(k, unused), _poison(v, unused)
    got = _kernels(*poisoned, start, stop, _poison(d_out, empty), d_lse, blocks=blocks, **arguments)
    out, lse, *gradients = jax.device_get(got)
    assert [x.dtype for x in (out, *gradients)] == [q.dtype, q.dtype, k.dtype, v.dtype]
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(empty[:, :, None], lse.shape))
    got = out, np.where(empty[:, :, None], np.float32(0), lse), *gradients
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        relative = 2e-2 if dtype == jnp.bfloat16 else 1e-5 if name in ("out", "lse") else 1e-4
        bound = relative * max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=relative, atol=bound, err_msg=name)


def _random_mask(seed, batch, rows, keys):
    """A third of the rows empty, others anywhere; batch rows differ."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, keys, (batch, rows))
    stop = np.minimum(keys, start + rng.integers(0, keys, (batch, rows)) * (rng.random((batch, rows)) < 0.7))
    return start.astype(np.int32), stop.astype(np.int32)


def _spans(length):
    """Causal with a window, adjacent spans and one of a single token."""
    return intervals.bidirectional_spans(intervals.causal(length, window=20), [(3, 19), (19, 30), (40, 41)])


def _packed(length):
    """Two segments with unused keys between and after them."""
    return intervals.packed(intervals.causal(length), [(0, 18), (23, length - 5)])


CASES = {
    "llama": ((40, 40, 4, 1, 128), _mask(intervals.causal(40)), {"dtype": jnp.bfloat16}),
    "gemma": ((50, 50, 2, 1, 256), _mask(_spans(50)), {"soft_cap": 30.0}),
    "qwen vision": ((33, 33, 2, 2, 80), _mask(intervals.packed(intervals.full(33), [(0, 16), (16, 32)])), {}),
    "siglip": ((49, 49, 2, 2, 72), _mask(intervals.full(49), 2), {"dtype": jnp.bfloat16, "blocks": None}),
    "head of 96, packed": ((61, 61, 5, 5, 96), _mask(_packed(61)), {}),
    "6 key heads, ragged": ((17, 47, 12, 6, 64), _random_mask(0, 2, 17, 47), {}),
    "head of 8, one row": ((1, 19, 2, 1, 8), _mask(intervals.RowIntervals(np.array([2]), np.array([18]))), {}),
    "negative scale": ((20, 20, 1, 1, 16), _mask(intervals.causal(20)), {"scale": -0.3}),
    "no row sees a key": ((20, 20, 1, 1, 16), (np.zeros((1, 20), np.int32),) * 2, {}),
    "beyond the keys": ((20, 20, 1, 1, 16), (np.full((1, 20), -3, np.int32), np.full((1, 20), 99, np.int32)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name):
    shape, mask, arguments = CASES[name]
    _check(shape, mask, **arguments)


@st.composite
def _intervals(draw, batch=2, rows=37, keys=45):
    pairs = st.lists(
        st.tuples(st.integers(0, keys), st.integers(0, keys)), min_size=batch * rows, max_size=batch * rows
    )
    pairs = np.asarray(draw(pairs), np.int32).reshape(batch, rows, 2)
    if draw(st.booleans()):  # runs of rows that share an interval, so that blocks without a mask occur
        pairs = np.repeat(pairs[:, :: draw(st.sampled_from([5, 18]))], 18, axis=1)[:, :rows]
    return pairs[:, :, 0], pairs[:, :, 1]


@settings(deadline=None, max_examples=25)
@given(_intervals(), st.integers(0, 2**16))
def test_random_intervals(mask, seed):
    _check((37, 45, 2, 1, 16), mask, seed=seed)


def test_the_same_bits_each_time():
    mask = _random_mask(1, 2, 37, 45)
    q, k, d_out = (
        _normal(i, (2, length, heads, 16), np.float32) for i, length, heads in ((0, 37, 2), (1, 45, 1), (2, 37, 2))
    )
    arguments = (q, k, k, *mask, d_out, np.zeros((2, 37, 2), np.float32))
    first, second = (_kernels(*arguments, scale=0.25, soft_cap=None, blocks=SMALL) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize(
    ("head_dim", "tiles"),
    [
        (8, ((0, 16),)),
        (24, ((0, 32),)),
        (64, ((0, 64),)),
        (72, ((0, 64), (64, 16))),
        (80, ((0, 64), (64, 16))),
        (96, ((0, 64), (64, 32))),
        (112, ((0, 128),)),
        (128, ((0, 128),)),
        (256, ((0, 256),)),
    ],
)
def test_tiles_cover_the_head(head_dim, tiles):
    assert pallas_gpu._tiles(head_dim) == tiles


def test_row_bounds():
    # Causal, 8 rows and keys in blocks of 2: the diagonal block is an edge, all below it are seen in full.
    start, stop = _mask(intervals.causal(8))
    problem = pallas_gpu._Problem(8, 8, 64, ((0, 64),), pallas_gpu.Blocks(2, 2, 4, 1), 1.0, None)
    bounds = pallas_gpu._row_bounds(start, stop, problem)
    assert bounds.tolist() == [[[0, 1, 4, 4], [1, 2, 4, 4], [2, 3, 4, 4], [3, 4, 4, 4]]]
    # A row that is not there makes the last block an edge.
    bounds = pallas_gpu._row_bounds(start[:, :7], stop[:, :7], problem._replace(num_rows=7))
    assert bounds.tolist()[0][0] == [0, 1, 3, 4]


def test_refuses_what_it_can_not_do():
    start, stop = _mask(intervals.causal(4))
    arguments = {"scale": 1.0, "soft_cap": None, "interpret": True}
    q = jnp.zeros((1, 4, 1, 64), jnp.float32)
    with pytest.raises(NotImplementedError, match="float32, bfloat16, float32"):
        pallas_gpu.forward(q, q.astype(jnp.bfloat16), q, start, stop, **arguments)
    q = jnp.zeros((1, 4, 1, 320), jnp.float32)
    with pytest.raises(NotImplementedError, match="8 to 256, got 320"):
        pallas_gpu.forward(q, q, q, start, stop, **arguments)
