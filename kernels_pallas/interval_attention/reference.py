"""The oracle: attention with row intervals as one softmax over a full score matrix."""

import jax
import jax.numpy as jnp

__all__ = ["attention_weights", "interval_attention"]


def interval_attention(q, k, v, kv_start, kv_stop, *, scale, soft_cap=None):
    """Output ``[B, T, N, H]`` and log-sums ``[B, T, N]``; float32 inside, T x S memory, derivatives by JAX.

    See `kernels_pallas.interval_attention.interval_attention`.
    """
    weights, lse = attention_weights(q, k, kv_start, kv_stop, scale=scale, soft_cap=soft_cap)
    used = _visible(k, kv_start, kv_stop).any(axis=1)[:, :, None, None]
    v = _by_query_head(jnp.where(used, v, jnp.zeros((), v.dtype)), q)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest").astype(q.dtype)
    return out, lse


def attention_weights(q, k, kv_start, kv_stop, *, scale, soft_cap=None):
    """What each row gives to each key, float32 ``[B, N, T, S]``, and log-sums ``[B, T, N]``.

    The weights of a row sum to 1, or are all 0 where it sees no key.
    """
    visible = _visible(k, kv_start, kv_stop)
    # What no row sees may be NaN, and so may the query of a row that sees nothing.
    q = jnp.where(visible.any(axis=2)[:, :, None, None], q, jnp.zeros((), q.dtype))
    k = _by_query_head(jnp.where(visible.any(axis=1)[:, :, None, None], k, jnp.zeros((), k.dtype)), q)
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision="highest") * scale
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    visible = visible[:, None]
    occupied = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible, scores, jnp.where(occupied, -jnp.inf, 0.0))
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)  # an empty row gives zeros
    lse = jnp.where(occupied[..., 0], jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return weights, lse.transpose(0, 2, 1)


def _visible(k, kv_start, kv_stop):
    """Whether a row sees a key ``[B, T, S]``."""
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]
    return (kv_start[:, :, None] <= keys) & (keys < kv_stop[:, :, None])


def _by_query_head(x, q):
    """Keys or values ``[B, S, K, H]`` for each query head, float32 ``[B, S, N, H]``."""
    return jnp.repeat(x, q.shape[2] // x.shape[2], axis=2).astype(jnp.float32)
