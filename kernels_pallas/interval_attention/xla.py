"""Attention with row intervals in plain XLA: blocks of queries by the blocks of keys that they see.

Memory is linear in tokens: one tile of scores is alive at a time, forward and backward; the backward pass makes
the scores of a tile again from the rows' log-sums (FlashAttention-2, https://arxiv.org/abs/2307.08691). Attention
that fits one tile has no loop at all.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.online_softmax import (
    LOWEST,
    finish,
    init_state,
    log_total,
    product,
    scores,
    seen_keys,
    update,
)
from kernels_pallas.platform import refuse_interpret

BLOCK_Q, BLOCK_K = 320, 320
"""Rows and keys of a tile at most."""
TILE_SCORES = 2**19
"""Scores of a tile, all heads, at most, where splitting the batch does it: 2 MiB, to stay in cache."""


class _Blocks(NamedTuple):
    """Rows, keys and scores of a tile, and how scores are made."""

    rows: int
    keys: int
    tile_scores: int
    scale: float
    soft_cap: float | None


def forward(q, k, v, kv_start, kv_stop, *, scale, soft_cap, interpret=False, with_lse=True, **blocks):
    """Output ``[B, T, N, H]`` and log-sums ``[B, T, N]``; see `kernels_pallas.interval_attention.differentiable`.

    ``blocks`` may give ``block_q``, ``block_k`` and ``tile_scores``, in place of the values above.
    """
    refuse_interpret("xla", interpret)
    B, T, N, _ = q.shape
    if 0 in (B, T, k.shape[1]):
        return jnp.zeros_like(q), jnp.full((B, T, N), -jnp.inf) if with_lse else None
    layout = _Layout(q, k, scale, soft_cap, **blocks)
    out, log_sums = _over_batch(_forward, layout.blocks, *layout.operands(q, k, v, kv_start, kv_stop))
    out, lse = layout.from_rows(out), layout.from_rows(log_sums)
    return out, jnp.where((kv_stop > kv_start)[..., None], lse, -jnp.inf) if with_lse else None


def backward(q, k, v, kv_start, kv_stop, lse, delta, d_out, *, scale, soft_cap, interpret=False, **blocks):
    """Gradients by q, k and v; arguments as for `forward`."""
    refuse_interpret("xla", interpret)
    if 0 in (*q.shape[:2], k.shape[1]):
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    layout = _Layout(q, k, scale, soft_cap, **blocks)
    lse = jnp.where((kv_stop > kv_start)[..., None], lse, 0)
    dq, dk, dv = _over_batch(
        _backward,
        layout.blocks,
        *layout.operands(q, k, v, kv_start, kv_stop),
        *(layout.to_rows(x) for x in (lse, delta, d_out)),
    )
    dk, dv = (x.transpose(0, 2, 1, 3)[:, : k.shape[1]] for x in (dk, dv))
    return layout.from_rows(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


class _Layout:
    """Heads before rows, ``[B, K, N // K, T, ..]`` against ``[B, K, S, H]``, in whole blocks."""

    def __init__(self, q, k, scale, soft_cap, block_q=BLOCK_Q, block_k=BLOCK_K, tile_scores=TILE_SCORES):
        _, self.rows, self.heads, _ = q.shape
        self.kv_heads = k.shape[2]
        self.blocks = _Blocks(_even(self.rows, block_q), _even(k.shape[1], block_k), tile_scores, scale, soft_cap)

    def operands(self, q, k, v, start, stop):
        k, v = (_pad(x, self.blocks.keys).transpose(0, 2, 1, 3) for x in (k, v))
        start, stop = (_pad(x, self.blocks.rows) for x in (start, stop))
        q = jnp.where((stop > start)[:, None, None, :, None], self.to_rows(q), jnp.zeros((), q.dtype))
        return q, k, v, start, stop

    def to_rows(self, x):
        """``[B, T, N, ..]`` to ``[B, K, N // K, T, ..]``."""
        x = _pad(x, self.blocks.rows)
        x = x.reshape(*x.shape[:2], self.kv_heads, self.heads // self.kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    def from_rows(self, x):
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(*x.shape[:2], self.heads, *x.shape[4:])[:, : self.rows]


def _even(length: int, most: int) -> int:
    """Size of equal blocks of at most ``most`` that cover ``length``: 577 in blocks of 256 at most is 3 of 193."""
    return math.ceil(length / math.ceil(length / most))


def _pad(x, block: int):
    """Zeros after axis 1 up to whole blocks; padded rows have empty intervals."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _over_batch(function, blocks: _Blocks, *arrays):
    """``function(blocks, *arrays)`` over tiles of the batch."""
    B, K, G = arrays[0].shape[:3]
    most = max(1, blocks.tile_scores // (K * G * blocks.rows * blocks.keys))
    batch = next(b for b in range(min(B, most), 0, -1) if B % b == 0)
    if batch == B:
        return function(blocks, *arrays)
    arrays = [x.reshape(-1, batch, *x.shape[1:]) for x in arrays]
    out = jax.lax.map(lambda tile: function(blocks, *tile), arrays)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _forward(blocks, q, k, v, start, stop):
    """Output and log-sums of a tile of the batch."""
    num_rows, num_keys = q.shape[3] // blocks.rows, k.shape[2] // blocks.keys
    kwargs = {"scale": blocks.scale, "soft_cap": blocks.soft_cap}

    def query_block(i):
        q_block = _cut(q, i, blocks.rows, 3)
        begin, end = (_cut(x, i, blocks.rows, 1) for x in (start, stop))

        def key_block(j, state):
            k_block, v_block = (_cut(x, j, blocks.keys, 2) for x in (k, v))
            return update(state, q_block, k_block, v_block, j * blocks.keys, begin, end, **kwargs)

        if num_keys == 1:
            state = key_block(0, None)
        else:
            first, last = _bounds(begin, end, blocks.keys)
            state = jax.lax.fori_loop(first, last, key_block, init_state(q_block))
        return finish(state, begin, end, q.dtype), log_total(state, begin, end)

    if num_rows == 1:
        return query_block(0)
    out, log_sums = jax.lax.map(query_block, jnp.arange(num_rows, dtype=jnp.int32))
    return jnp.moveaxis(out, 0, 3).reshape(q.shape), jnp.moveaxis(log_sums, 0, 3).reshape(q.shape[:-1])


def _backward(blocks, q, k, v, start, stop, log_sums, delta, d_out):
    """Gradients by q, k and v of a tile of the batch, float32."""
    num_rows, num_keys = q.shape[3] // blocks.rows, k.shape[2] // blocks.keys
    if num_rows == num_keys == 1:
        dq, dk, dv = _tile_gradients(blocks, q, d_out, log_sums, delta, start, stop, k, v, 0)
        return dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3)

    def query_block(carry, i):
        q_block, d_block, log_block, delta_block = (_cut(x, i, blocks.rows, 3) for x in (q, d_out, log_sums, delta))
        begin, end = (_cut(x, i, blocks.rows, 1) for x in (start, stop))

        def key_block(j, carry):
            k_block, v_block = (_cut(x, j, blocks.keys, 2) for x in (k, v))
            new = _tile_gradients(blocks, q_block, d_block, log_block, delta_block, begin, end, k_block, v_block, j)
            return carry[0] + new[0], _add(carry[1], j, new[1]), _add(carry[2], j, new[2])

        first, last = _bounds(begin, end, blocks.keys)
        dq = jnp.zeros(q_block.shape, jnp.float32)
        dq, *carry = jax.lax.fori_loop(first, last, key_block, (dq, *carry))
        return tuple(carry), dq

    zeros = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
    (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(num_rows, dtype=jnp.int32))
    return jnp.moveaxis(dq, 0, 3).reshape(q.shape), jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3)


def _tile_gradients(blocks, q, d_out, log_sum, delta, start, stop, k, v, j):
    """What one tile adds to the gradients by q ``[.., T, H]``, and by k and v with keys last ``[.., H, S]``.

    Keys last, since the product then runs over the weights' rows as they lie.
    """
    seen = seen_keys(start, stop, j * blocks.keys, k.shape[2])
    used = seen.any(axis=1)[:, None, :, None]
    k, v = (jnp.where(used, x, jnp.zeros((), x.dtype)) for x in (k, v))  # unseen slots may hold NaN
    # XLA's CPU backend refuses some products of bfloat16 that accumulate in float32.
    q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
    raw = scores(q, k, scale=blocks.scale, soft_cap=blocks.soft_cap)
    weights = jnp.exp(jnp.where(seen[:, None, None], raw, LOWEST) - log_sum[..., None])
    d_weights = product("bkgth,bksh->bkgts", d_out, v)
    d_scores = weights * (d_weights - delta[..., None]) * jnp.float32(blocks.scale)
    if blocks.soft_cap is not None:
        d_scores = d_scores * (1 - jnp.square(raw / jnp.float32(blocks.soft_cap)))
    dq = product("bkgts,bksh->bkgth", d_scores, k)
    dk = product("bkgth,bkgts->bkhs", q, d_scores)
    dv = product("bkgth,bkgts->bkhs", d_out, weights)
    return dq, dk, dv


def _bounds(start, stop, block: int):
    """First and past-the-last block of keys that any of the rows sees."""
    occupied = stop > start
    first = jnp.min(jnp.where(occupied, start, jnp.iinfo(jnp.int32).max)) // block
    return first, -(-jnp.max(jnp.where(occupied, stop, 0)) // block)


def _cut(x, i, size: int, axis: int):
    """Block ``i`` of ``size`` along ``axis``."""
    return x if x.shape[axis] == size else jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _add(total, j, block):
    """``total`` with ``block`` added at its place along the last axis."""
    size = block.shape[-1]
    there = jax.lax.dynamic_slice_in_dim(total, j * size, size, -1)
    return jax.lax.dynamic_update_slice_in_dim(total, there + block, j * size, -1)
