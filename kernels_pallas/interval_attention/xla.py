"""Attention with row intervals in plain XLA: blocks of queries by blocks of keys, an online softmax between.

Memory is linear in tokens: one ``block_q x block_k`` tile of scores a head is alive at a time. Online softmax:
Milakov and Gimelshein, https://arxiv.org/abs/1805.02867.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.online_softmax import SoftmaxState, finish, init_state, update


def interval_attention(q, k, v, kv_start, kv_stop, *, scale, soft_cap=None, block_q=256, block_k=512):
    """See `kernels_pallas.interval_attention.interval_attention`."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    block_q, block_k = min(block_q, T), min(block_k, S)
    num_q, num_k = -(-T // block_q), -(-S // block_k)
    q, kv_start, kv_stop = (_pad(x, num_q * block_q) for x in (q, kv_start, kv_stop))
    k, v = (_pad(x, num_k * block_k) for x in (k, v))
    q = jnp.moveaxis(q.reshape(B, num_q, block_q, K, N // K, H), 1, 0)
    kv_start, kv_stop = (jnp.moveaxis(x.reshape(B, num_q, block_q), 1, 0) for x in (kv_start, kv_stop))
    k, v = (jnp.moveaxis(x.reshape(B, num_k, block_k, K, H), 1, 0) for x in (k, v))
    offsets = jnp.arange(num_k, dtype=jnp.int32) * block_k

    def query_block(args):
        q_block, start, stop = args

        @jax.checkpoint
        def key_block(state: SoftmaxState, xs):
            k_block, v_block, offset = xs
            return update(
                state, q_block, k_block, v_block, offset, start, stop, scale=scale, soft_cap=soft_cap
            ), None

        state, _ = jax.lax.scan(key_block, init_state(q_block), (k, v, offsets))
        return finish(state, q_block.dtype)

    if num_q == 1:
        out = query_block((q[0], kv_start[0], kv_stop[0]))[None]
    else:
        out = jax.lax.map(query_block, (q, kv_start, kv_stop))
    return jnp.moveaxis(out, 0, 1).reshape(B, num_q * block_q, N, H)[:, :T]


def _pad(x, length):
    """Zeros after axis 1 up to ``length``; padded rows have empty intervals."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
