"""Gradients of dense attention by the TPU kernel: interpreted against `jax.grad` of the reference, and compiled."""

import os
from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import EDGES, draw_intervals, draw_qkv, seeds
from tpu_compiler import needs_libtpu

from kernels_pallas.compile_only import tpu
from kernels_pallas.interval_attention import pallas_tpu_backward, reference
from kernels_pallas.interval_attention.pallas_tpu_backward import Plan, plan_for

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling is what these tests would spend their time on."""


@cache
def expected(scale, soft_cap):
    """Jitted: ``(qkv, intervals, d_out)`` to gradients, and the rows' log-sums and deltas that the kernel is given."""

    def both(qkv, intervals, d_out):
        attention = partial(reference.interval_attention, scale=scale, soft_cap=soft_cap)
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, *intervals)[0], *qkv)
        return pull(d_out), log_sums(*qkv[:2], *intervals, scale, soft_cap), (out * d_out).sum(-1)

    return jax.jit(both, compiler_options=QUICK)


def log_sums(q, k, start, stop, scale, soft_cap):
    """Logarithm of each row's sum of exponentials ``[B, T, N]``; -inf for a row that sees no key."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->btns", q, k) * scale
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    at = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]
    seen = (start[..., None] <= at) & (at < stop[..., None])
    return jax.nn.logsumexp(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=-1)


@cache
def kernel(scale, soft_cap, plan):
    return jax.jit(
        partial(pallas_tpu_backward.backward, scale=scale, soft_cap=soft_cap, interpret=True, plan=plan),
        compiler_options=QUICK,
    )


def check(shape, intervals, seed, *, soft_cap=None, plan=None, poison=False):
    """Compares gradients; with ``poison``, rows, keys and values that count for nothing are NaN for the kernel."""
    S, H = shape[2], shape[-1]
    rng = np.random.default_rng(seed)
    q, k, v = draw_qkv(rng, *shape)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    start, stop = map(jnp.asarray, intervals)
    by, lse, delta = expected(H**-0.5, soft_cap)((q, k, v), (start, stop), d_out)
    if poison:
        at = jnp.arange(S, dtype=jnp.int32)[None, None]
        seen = (start[..., None] <= at) & (at < stop[..., None])
        assert not bool(seen.any(axis=1).all())
        assert not bool(seen.any(axis=2).all())
        q, d_out = (jnp.where(seen.any(axis=2)[..., None, None], x, jnp.nan) for x in (q, d_out))
        k, v = (jnp.where(seen.any(axis=1)[..., None, None], x, jnp.nan) for x in (k, v))
        delta = jnp.where(seen.any(axis=2)[..., None], delta, jnp.nan)
    found = kernel(H**-0.5, soft_cap, plan)(q, k, v, start, stop, lse, delta, d_out)
    chex.assert_trees_all_close(found, by, rtol=1e-4, atol=1e-4)


def causal(T, S):
    return np.zeros((1, T), np.int32), np.minimum(np.arange(T) + 1 + max(0, S - T), S)[None].astype(np.int32)


def window(T, S, size):
    stop = causal(T, S)[1]
    return np.maximum(stop - size, 0), stop


def segments(T, S, lengths, gap=0):
    """Rows and keys of one length after the other; ``gap`` keys after each belong to nobody."""
    bounds = np.cumsum([0, *lengths])
    which = np.minimum(np.searchsorted(bounds, np.arange(T), side="right") - 1, len(lengths) - 1)
    return bounds[which][None].astype(np.int32), np.minimum(bounds[which + 1] - gap, S)[None].astype(np.int32)


def with_empty(intervals, rows):
    start, stop = (np.array(x) for x in intervals)
    stop[:, rows] = start[:, rows]
    return start, stop


CHUNKS = Plan(rows=128, keys=256, edge_keys=128, key_heads=1, group=2, chunk=256)
PARTS = Plan(rows=128, keys=128, edge_keys=128, key_heads=1, group=2, chunk=1024)
SMALL = Plan(rows=128, keys=256, edge_keys=128, key_heads=1, group=1, chunk=1024)
SHAPE, SHARED = (1, 520, 640, 1, 1, 64), {"plan": SMALL}  # compiled once
# B, T, S, N, K, H; intervals; options of `check`
CASES = {
    "head 72": ((1, 60, 200, 2, 2, 72), (np.zeros((1, 60), np.int32), np.full((1, 60), 200, np.int32)), {}),
    "head 80": ((1, 130, 130, 2, 1, 80), window(130, 130, 40), {}),
    "head 96": ((1, 100, 90, 3, 1, 96), causal(100, 90), {}),
    "head 128": ((1, 800, 1100, 2, 1, 128), causal(800, 1100), {}),
    "head 256": ((1, 140, 300, 2, 1, 256), causal(140, 300), {}),
    "head 8, one row and key": ((1, 1, 1, 1, 1, 8), causal(1, 1), {}),
    "5 key heads": ((1, 70, 120, 5, 5, 64), window(70, 120, 33), {}),
    "6 key heads": ((1, 70, 120, 6, 6, 64), causal(70, 120), {}),
    "group of 7": ((1, 40, 120, 7, 1, 128), causal(40, 120), {}),
    "soft cap": (SHAPE, causal(520, 640), {"soft_cap": 2.0, **SHARED}),
    "causal": (SHAPE, causal(520, 640), SHARED),
    "window": (SHAPE, window(520, 640, 200), SHARED),
    "packed": (SHAPE, segments(520, 640, [100, 28, 1, 300, 211]), SHARED),
    "one-token spans": (SHAPE, segments(520, 640, [1] * 520), SHARED),
    "all empty": (SHAPE, (np.full((1, 520), 9, np.int32), np.full((1, 520), 9, np.int32)), SHARED),
    "NaN at edges": (
        SHAPE,
        with_empty(segments(520, 640, [100, 28, 300, 212], gap=5), slice(90, 140)),
        {"poison": True, **SHARED},
    ),
    "NaN beside free tiles": (
        SHAPE,
        with_empty((np.full((1, 520), 0, np.int32), np.full((1, 520), 530, np.int32)), slice(3, 520, 7)),
        {"poison": True, **SHARED},
    ),
    "NaN in chunks": (
        (2, 150, 520, 4, 2, 64),
        with_empty((np.full((2, 150), 200, np.int32), np.full((2, 150), 490, np.int32)), slice(0, 140, 3)),
        {"poison": True, "plan": CHUNKS},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_tpu_backward_equals_reference(name):
    shape, intervals, options = CASES[name]
    check(shape, intervals, 0, **options)


@given(st.sampled_from([PARTS, CHUNKS]), st.sampled_from(EDGES), seeds)
@settings(max_examples=12, deadline=None)
@pytest.mark.once
def test_kernels_tpu_backward_random_intervals(plan, kind, seed):
    shape = (2, 150, 520, 4, 2, 64)
    check(shape, draw_intervals(np.random.default_rng(seed), kind, 2, 150, 520), seed, plan=plan)


def test_kernels_tpu_backward_bfloat16():
    rng = np.random.default_rng(0)
    q, k, v = draw_qkv(rng, *SHAPE, jnp.bfloat16)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16)
    intervals = tuple(map(jnp.asarray, causal(520, 640)))
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    by, lse, delta = expected(0.125, None)(wide, intervals, d_out.astype(jnp.float32))
    found = kernel(0.125, None, SMALL)(q, k, v, *intervals, lse, delta, d_out)
    chex.assert_type(found, jnp.bfloat16)
    chex.assert_trees_all_close(tuple(x.astype(jnp.float32) for x in found), by, rtol=2e-2, atol=2e-2)


V5E, V4 = 128 * 2**20, 16 * 2**20


@pytest.mark.parametrize("vmem", [V4, V5E])
@pytest.mark.parametrize("itemsize", [2, 4])
@given(*(st.integers(1, n) for n in (70_000, 70_000, 16, 32)), st.sampled_from([8, 64, 72, 80, 96, 128, 256]))
@settings(max_examples=100, deadline=None)
@pytest.mark.once
def test_kernels_tpu_backward_plan_fits(vmem, itemsize, T, S, G, K, H):
    """Heads divide, blocks nest, and what stays in VMEM through a call fits."""
    plan = plan_for(T, S, K * G, K, H, itemsize, vmem)
    assert K % plan.key_heads == 0
    assert G % plan.group == 0
    assert plan.key_heads == 1 or plan.group == G
    assert plan.rows % 128 == plan.edge_keys % 128 == plan.keys % plan.edge_keys == plan.chunk % plan.edge_keys == 0
    width = plan.key_heads * -(-H // 128) * 128
    assert plan.chunk * width * (8 * itemsize + 8) + plan.rows * plan.group * width * (8 * itemsize + 4) < vmem


def test_kernels_tpu_backward_refuses_what_it_cannot_do():
    q = jnp.zeros((1, 256, 4, 64), jnp.float32)
    rows, lse = jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 256, 4))

    def call(dtype, **options):
        x = q.astype(dtype)
        pallas_tpu_backward.backward(
            x, x, x, rows, rows, lse, lse, x, scale=1.0, soft_cap=None, interpret=True, **options
        )

    with pytest.raises(NotImplementedError, match="bfloat16 or float32; got float16"):
        call(jnp.float16)
    with pytest.raises(ValueError, match="doesn't divide 4 query and 4 key heads"):
        call(jnp.float32, plan=SMALL._replace(key_heads=3))
    with pytest.raises(ValueError, match="multiples of 128"):
        call(jnp.float32, plan=SMALL._replace(rows=64))
    measured = (np.zeros((1, 256), np.int32),) * 2
    with pytest.raises(ValueError, match="one chunk; 256 keys make 2 of 128"):
        call(jnp.float32, measured=measured, plan=SMALL._replace(chunk=128, keys=128))


# B, T, S, N, K, H
PUBLISHED = {
    "Llama": (1, 4096, 4096, 32, 8, 128),
    "Gemma 3": (1, 4096, 4096, 8, 4, 256),
    "SigLIP": (2, 729, 729, 16, 16, 72),
    "CLIP-L": (2, 577, 577, 16, 16, 64),
}


def program(shapes):
    """What `tpu.run` compiles, in its own process: the gradients of each shape."""
    args = []
    for B, T, S, N, K, H in shapes:
        q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, T, N, H), (B, S, K, H)))
        row, bound = (jax.ShapeDtypeStruct(x, d) for x, d in (((B, T, N), jnp.float32), ((B, T), jnp.int32)))
        args.append((q, k, k, bound, bound, row, row, q))

    def gradients(*args):
        return [pallas_tpu_backward.backward(*a, scale=0.125, soft_cap=None, interpret=False) for a in args]

    return gradients, args


def compiled(chip, *shapes, monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parents[1]))))
    found = tpu.run(chip, f"{Path(__file__).stem}:program", {"shapes": shapes}, cycles=False)
    assert "error" not in found, found["error"]
    return found["temp_bytes"]


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_kernels_tpu_backward_compiles(chip, monkeypatch):
    compiled(chip, *PUBLISHED.values(), monkeypatch=monkeypatch)


@needs_libtpu
@pytest.mark.once
def test_kernels_tpu_backward_memory_is_linear(monkeypatch):
    """Temporary memory, with keys in one chunk and in several, against that of a T x S matrix of one head."""
    one, some, many = (compiled("v5e", (1, T, T, 4, 1, 128), monkeypatch=monkeypatch) for T in (2**14, 2**15, 2**17))
    assert many <= 4.5 * some
    assert one < 4 * 2**28 / 8
    assert many < 4 * 2**34 / 32
