"""Random attention problems, and NumPy oracles that build every mask in full."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

ON_GPU = jax.default_backend() == "gpu"
"""Whether this machine's GPU runs the GPU's kernels (``JAX_PLATFORMS=cuda``); elsewhere they run as plain JAX."""
COMPILE_FAST = {} if ON_GPU else {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for programs that run once or a few times on little data: nearly all time goes to XLA."""

EDGES = ("random", "causal", "windows", "packed", "empty")


def draw_intervals(rng: np.random.Generator, kind: str, B: int, T: int, S: int):
    """Row intervals ``[B, T]`` into S keys of one kind, with some rows empty where the kind has them."""
    row = np.broadcast_to(np.arange(T), (B, T))
    if kind == "causal":
        start, stop = np.zeros((B, T)), np.minimum(row + 1 + max(0, S - T), S)
    elif kind == "windows":
        stop = np.minimum(row + 1, S)
        start = np.maximum(stop - rng.integers(1, 6), 0)
    elif kind == "packed":
        cuts = np.sort(rng.integers(0, S + 1, (B, 2)), axis=1)
        start = np.where(row < T // 2, 0, cuts[:, :1])
        stop = np.where(row < T // 2, cuts[:, :1], cuts[:, 1:])
    elif kind == "empty":
        start = stop = np.full((B, T), rng.integers(0, S + 1))
    else:
        ends = rng.integers(0, S + 1, (2, B, T))
        start, stop = np.where(rng.random((B, T)) < 0.8, np.sort(ends, axis=0), ends)  # some start past their stop
    return start.astype(np.int32), stop.astype(np.int32)


def mask_of(start, stop, S: int) -> np.ndarray:
    """The mask ``[..., T, S]`` that the intervals stand for."""
    keys = np.arange(S)
    return (np.asarray(start)[..., None] <= keys) & (keys < np.asarray(stop)[..., None])


def dense_oracle(q, k, v, mask, scale, soft_cap=None) -> np.ndarray:
    """Attention ``[B, T, N, H]`` under ``mask`` ``[B, T, S]``, float64, one row and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t in np.ndindex(q.shape[:2]):
        seen = mask[b, t]
        for n in range(q.shape[2]) if seen.any() else ():
            head = n * k.shape[2] // q.shape[2]
            scores = k[b, seen, head] @ q[b, t, n] * scale
            if soft_cap is not None:
                scores = np.tanh(scores / soft_cap) * soft_cap
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


def draw_qkv(rng: np.random.Generator, B, T, S, N, K, H, dtype=jnp.float32):
    """Standard normal queries, keys and values."""
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


seeds = st.integers(0, 2**32 - 1)
