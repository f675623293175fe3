"""The oracle: attention with row intervals as one softmax over a full score matrix."""

import jax
import jax.numpy as jnp


def interval_attention(q, k, v, kv_start, kv_stop, *, scale, soft_cap=None):
    """See `kernels_pallas.interval_attention.interval_attention`; float32 inside, T x S memory."""
    groups = q.shape[2] // k.shape[2]
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]
    visible = (kv_start[:, :, None] <= keys) & (keys < kv_stop[:, :, None])  # [B, T, S]
    used = visible.any(axis=1)[:, :, None, None]
    k, v = (jnp.where(used, x, jnp.zeros((), x.dtype)) for x in (k, v))  # what no row sees may be NaN
    k, v = (jnp.repeat(x, groups, axis=2).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k) * scale
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    visible = visible[:, None]
    scores = jnp.where(visible, scores, jnp.where(visible.any(axis=-1, keepdims=True), -jnp.inf, 0.0))
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)  # an empty row gives zeros
    return jnp.einsum("bnts,bsnh->btnh", weights, v).astype(q.dtype)
