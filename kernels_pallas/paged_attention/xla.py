"""Paged attention in plain XLA: blocks of pages, an online softmax between, and no page that nobody sees.

Tiles of one row (decode) go through the key blocks together; larger tiles (prefill) one after another, each
from its own first visible block to its last.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.online_softmax import finish, init_state, update

BLOCK_TOKENS = 256
"""Keys that are gathered and scored at a time."""


def paged_attention(
    q, k_pages, v_pages, block_tables, tile_request, kv_start, kv_stop, *, scale, soft_cap=None
):
    """See `kernels_pallas.paged_attention.paged_attention`."""
    T, N, H = q.shape
    page_size, K = k_pages.shape[1:3]
    G = tile_request.shape[0]
    pages_per_block = max(1, min(BLOCK_TOKENS // page_size, block_tables.shape[1]))
    width = -(-block_tables.shape[1] // pages_per_block) * pages_per_block
    tables = jnp.pad(block_tables, ((0, 0), (0, width - block_tables.shape[1])))[tile_request]  # [G, width]
    q = q.reshape(G, T // G, K, N // K, H)
    kv_start, kv_stop = kv_start.reshape(G, T // G), kv_stop.reshape(G, T // G)
    block = pages_per_block * page_size

    def attend(tile):
        q, tables, start, stop = tile  # [g, t, K, N // K, H], [g, width], [g, t], [g, t]
        occupied = stop > start

        def key_block(j, state):
            pages = jax.lax.dynamic_slice_in_dim(tables, j * pages_per_block, pages_per_block, axis=1)
            k, v = (x[pages].reshape(len(pages), block, K, H) for x in (k_pages, v_pages))
            return update(state, q, k, v, j * block, start, stop, scale=scale, soft_cap=soft_cap)

        first = jnp.min(jnp.where(occupied, start, width * page_size)) // block
        last = -(-jnp.max(jnp.where(occupied, stop, 0)) // block)
        return finish(jax.lax.fori_loop(first, last, key_block, init_state(q)), q.dtype)

    if T == G:
        out = attend((q, tables, kv_start, kv_stop))
    else:
        tiles = (q[:, None], tables[:, None], kv_start[:, None], kv_stop[:, None])
        out = jax.lax.map(attend, tiles)
    return out.reshape(T, N, H)
