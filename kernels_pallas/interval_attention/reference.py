"""The oracle: attention with row intervals as one softmax over a full score matrix."""

import jax
import jax.numpy as jnp


def interval_attention(q, k, v, kv_start, kv_stop, *, scale, soft_cap=None):
    """Output ``[B, T, N, H]`` and log-sums ``[B, T, N]``; float32 inside, T x S memory, derivatives by JAX.

    See `kernels_pallas.interval_attention.interval_attention`.
    """
    groups = q.shape[2] // k.shape[2]
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]
    visible = (kv_start[:, :, None] <= keys) & (keys < kv_stop[:, :, None])  # [B, T, S]
    occupied = visible.any(axis=2)[:, :, None, None]
    used = visible.any(axis=1)[:, :, None, None]
    # What no row sees may be NaN, and so may the query of a row that sees nothing.
    q = jnp.where(occupied, q, jnp.zeros((), q.dtype))
    k, v = (jnp.where(used, x, jnp.zeros((), x.dtype)) for x in (k, v))
    k, v = (jnp.repeat(x, groups, axis=2).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision="highest") * scale
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    visible = visible[:, None]
    occupied = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible, scores, jnp.where(occupied, -jnp.inf, 0.0))
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)  # an empty row gives zeros
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest").astype(q.dtype)
    lse = jnp.where(occupied[..., 0], jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return out, lse.transpose(0, 2, 1)
