"""One step of an online softmax over a block of keys: shared by the XLA forms of dense and paged attention."""

from typing import NamedTuple

import jax.numpy as jnp

LOWEST = -1e30
"""Stands for minus infinity: finite, so that a row that has seen no key yet makes no NaN."""


class SoftmaxState(NamedTuple):
    """Running maximum and sum ``[B, T, K, G]`` and weighted values ``[B, T, K, G, H]``, float32."""

    maximum: jnp.ndarray
    total: jnp.ndarray
    values: jnp.ndarray


def init_state(q) -> SoftmaxState:
    """The state before any key, for queries ``[B, T, K, G, H]``."""
    return SoftmaxState(
        jnp.full(q.shape[:-1], LOWEST, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def update(state, q, k, v, offset, start, stop, *, scale, soft_cap=None) -> SoftmaxState:
    """Take in keys and values ``[B, S, K, H]`` that stand at positions ``offset ..``; intervals ``[B, T]``."""
    keys = (offset + jnp.arange(k.shape[1], dtype=jnp.int32))[None, None]
    visible = (start[..., None] <= keys) & (keys < stop[..., None])  # [B, T, S]
    # Slots that no row sees may hold anything, NaN too, and 0 * NaN is NaN.
    v = jnp.where(visible.any(axis=1)[:, :, None, None], v, jnp.zeros((), v.dtype))
    visible = visible[:, :, None, None, :]
    scores = jnp.einsum("btkgh,bskh->btkgs", q, k, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(scale)
    if soft_cap is not None:
        scores = jnp.tanh(scores / jnp.float32(soft_cap)) * jnp.float32(soft_cap)
    scores = jnp.where(visible, scores, LOWEST)
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
    decay = jnp.exp(state.maximum - maximum)
    values = jnp.einsum("btkgs,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return SoftmaxState(
        maximum,
        state.total * decay + weights.sum(axis=-1),
        state.values * decay[..., None] + values,
    )


def finish(state: SoftmaxState, dtype):
    """Attention's output ``[B, T, K, G, H]``; a row that saw no key gives zeros."""
    total = jnp.where(state.total == 0, 1.0, state.total)
    return (state.values / total[..., None]).astype(dtype)
