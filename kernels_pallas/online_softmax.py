"""One step of an online softmax over a block of keys: shared by the XLA forms of dense and paged attention.

Heads stand before rows, ``[B, K, N // K, T, H]`` against ``[B, K, S, H]``, as a batched matrix product wants them.
Online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["LOWEST", "SoftmaxState", "finish", "init_state", "log_total", "product", "scores", "seen_keys", "update"]

LOWEST = -1e30
"""Score of a key that a row does not see: finite, so that a row that has seen no key yet makes no NaN."""


class SoftmaxState(NamedTuple):
    """Running maximum and sum ``[B, K, N // K, T]`` and weighted values ``[B, K, N // K, T, H]``, float32."""

    maximum: jnp.ndarray
    total: jnp.ndarray
    values: jnp.ndarray


def init_state(q) -> SoftmaxState:
    """The state before any key, for queries ``[B, K, N // K, T, H]``."""
    return SoftmaxState(
        jnp.full(q.shape[:-1], LOWEST, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def seen_keys(start, stop, offset, length: int):
    """Whether a row sees each of ``length`` keys that stand at positions ``offset ..``: ``[B, T, S]``."""
    keys = (offset + jnp.arange(length, dtype=jnp.int32))[None, None]
    return (start[..., None] <= keys) & (keys < stop[..., None])


def product(equation: str, a, b):
    """An einsum that accumulates in float32, and on accelerators too keeps all of float32 where it is given that."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def scores(q, k, *, scale, soft_cap=None):
    """Scores ``[B, K, N // K, T, S]`` before masking, float32."""
    scores = product("bkgth,bksh->bkgts", q, k) * jnp.float32(scale)
    if soft_cap is not None:
        scores = jnp.tanh(scores / jnp.float32(soft_cap)) * jnp.float32(soft_cap)
    return scores


def update(state: SoftmaxState | None, q, k, v, offset, start, stop, *, scale, soft_cap=None) -> SoftmaxState:
    """Take in keys and values ``[B, K, S, H]`` that stand at positions ``offset ..``; intervals ``[B, T]``.

    Without a state these are the first keys. What a row gathers before it sees a key counts for nothing: its
    decay is ``exp(LOWEST - maximum) = 0`` when it does, and `finish` clears a row that never does.
    """
    seen = seen_keys(start, stop, offset, k.shape[2])
    # Slots that no row sees may hold anything, NaN too, and 0 * NaN is NaN.
    v = jnp.where(seen.any(axis=1)[:, None, :, None], v, jnp.zeros((), v.dtype))
    new = jnp.where(seen[:, None, None], scores(q, k, scale=scale, soft_cap=soft_cap), LOWEST)
    maximum = new.max(axis=-1)
    if state is not None:
        maximum = jnp.maximum(state.maximum, maximum)
    weights = jnp.exp(new - maximum[..., None])
    values = product("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    total = weights.sum(axis=-1)
    if state is None:
        return SoftmaxState(maximum, total, values)
    decay = jnp.exp(state.maximum - maximum)
    return SoftmaxState(maximum, state.total * decay + total, state.values * decay[..., None] + values)


def finish(state: SoftmaxState, start, stop, dtype):
    """Attention's output ``[B, K, N // K, T, H]``; a row that sees no key gives zeros."""
    occupied = (stop > start)[:, None, None]
    share = jnp.where(occupied, 1 / jnp.where(occupied, state.total, 1), 0)
    return (state.values * share[..., None]).astype(dtype)


def log_total(state: SoftmaxState, start, stop):
    """Logarithm of each row's sum of exponentials ``[B, K, N // K, T]``; 0 for a row that sees no key."""
    occupied = (stop > start)[:, None, None]
    return jnp.where(occupied, state.maximum + jnp.log(jnp.where(occupied, state.total, 1)), 0)
