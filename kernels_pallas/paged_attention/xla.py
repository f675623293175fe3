"""Paged attention in plain XLA: blocks of pages, an online softmax between, and no page that nobody sees.

Tiles of one row (decode) go through the key blocks together. Larger tiles (prefill) go in groups of up to
`GROUP_ROWS` rows, one group after another. A group of one request, as most are, gathers its keys once and
multiplies larger matrices; any other takes its tiles one by one. Each starts at the first block that one of its
rows sees and ends with the last.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.online_softmax import finish, init_state, update

BLOCK_TOKENS = 256
"""Keys that are gathered and scored at a time."""
GROUP_ROWS = 64
"""Rows of consecutive prefill tiles that go together, at most."""


def paged_attention(
    q,
    k_pages,
    v_pages,
    block_tables,
    tile_request,
    kv_start,
    kv_stop,
    *,
    scale,
    soft_cap=None,
    block_tokens=BLOCK_TOKENS,
    group_rows=GROUP_ROWS,
):
    """See `kernels_pallas.paged_attention.paged_attention`."""
    T, N, H = q.shape
    page_size, K = k_pages.shape[1:3]
    pages_per_block = max(1, min(block_tokens // page_size, block_tables.shape[1]))
    block = pages_per_block * page_size
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % pages_per_block)))
    num_tiles = tile_request.shape[0]
    tile_rows = T // num_tiles

    def attend(q, requests, start, stop):
        """Rows ``[B, t, N, H]`` of ``[B]`` requests with intervals ``[B, t]``."""
        tables = block_tables[requests]
        q = q.reshape(*q.shape[:2], K, N // K, H).transpose(0, 2, 3, 1, 4)

        def key_block(j, state):
            pages = jax.lax.dynamic_slice_in_dim(tables, j * pages_per_block, pages_per_block, axis=1)
            k, v = (x[pages].reshape(len(pages), block, K, H).transpose(0, 2, 1, 3) for x in (k_pages, v_pages))
            return update(state, q, k, v, j * block, start, stop, scale=scale, soft_cap=soft_cap)

        occupied = stop > start
        first = jnp.min(jnp.where(occupied, start, tables.shape[1] * page_size)) // block
        last = -(-jnp.max(jnp.where(occupied, stop, 0)) // block)
        state = jax.lax.fori_loop(first, last, key_block, init_state(q))
        return finish(state, start, stop, q.dtype).transpose(0, 3, 1, 2, 4).reshape(-1, N, H)

    def group(tiles):
        q, requests, start, stop = tiles  # [g, t, N, H], [g], [g, t], [g, t]
        occupied = (stop > start).any(axis=1)
        request = requests[jnp.argmax(occupied)]

        def together():
            return attend(q.reshape(1, -1, N, H), request[None], start.reshape(1, -1), stop.reshape(1, -1))

        def apart():
            out = jax.lax.map(lambda tile: attend(*(x[None] for x in tile)), tiles)
            return out.reshape(-1, N, H)

        return jax.lax.cond(jnp.all(~occupied | (requests == request)), together, apart)

    tiles = (q.reshape(num_tiles, tile_rows, N, H), tile_request,
             kv_start.reshape(num_tiles, tile_rows), kv_stop.reshape(num_tiles, tile_rows))  # fmt: skip
    if tile_rows == 1:
        return attend(*tiles)
    size = min(max(1, group_rows // tile_rows), num_tiles)
    padding = -num_tiles % size  # tiles of empty rows
    grouped = [jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]) for x in tiles]
    return jax.lax.map(group, grouped).reshape(-1, N, H)[:T]
