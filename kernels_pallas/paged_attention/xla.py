"""Paged attention in plain XLA: blocks of pages, an online softmax between, and no page that nobody sees.

Rows of decode go through the key blocks together. Tiles of prefill go in groups of up to `GROUP_ROWS` rows, one
group after another. A group of one request, as most are, gathers its keys once and multiplies larger matrices; any
other takes its tiles one by one. Each starts at the first block that one of its rows sees and ends with the last.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.online_softmax import finish, init_state, update
from kernels_pallas.platform import refuse_interpret

BLOCK_TOKENS = 256
"""Keys of a request that are gathered and scored at a time, at most."""
BLOCK_BYTES = 2**20
"""Bytes of keys and values of all requests that are gathered at a time, at most, where `LEAST_TOKENS` take less."""
LEAST_TOKENS = 32
"""Keys of a request that are gathered at a time, at least: with fewer, the loop costs more than it saves."""
GROUP_ROWS = 64
"""Rows of consecutive prefill tiles that go together, at most."""


def paged_attention(
    q,
    pages,
    block_tables,
    tile_request,
    kv_start,
    kv_stop,
    *,
    decode_rows=0,
    scale,
    soft_cap=None,
    interpret=False,
    block_tokens=BLOCK_TOKENS,
    block_bytes=BLOCK_BYTES,
    group_rows=GROUP_ROWS,
):
    """See `kernels_pallas.paged_attention.paged_attention`."""
    refuse_interpret("xla", interpret)
    T, N, H = q.shape
    K, page_size = pages.shape[1:3]
    M, page_bytes = block_tables.shape[1], 2 * K * page_size * H * pages.dtype.itemsize
    heads = jnp.arange(K, dtype=jnp.int32)[None, :, None]

    def gather(index, column):
        """Columns ``column .. column + H`` of the heads ``index`` of pages ``[P * K, page_size, W]``."""
        flat = pages.reshape(-1, *pages.shape[2:])
        return jax.vmap(lambda i: jax.lax.dynamic_slice(flat, (i, 0, column), (1, page_size, H)))(index)

    num_tiles = len(tile_request) - decode_rows
    tile_rows = (T - decode_rows) // max(num_tiles, 1)
    if tile_rows == 1:
        decode_rows, num_tiles = T, 0

    def attend(q, requests, start, stop):
        """Rows ``[B, t, N, H]`` of ``[B]`` requests with intervals ``[B, t]``."""
        block_pages = max(-(-LEAST_TOKENS // page_size), block_bytes // (len(requests) * page_bytes))
        block_pages = min(block_pages, max(1, block_tokens // page_size), M)
        block = block_pages * page_size
        tables = jnp.pad(block_tables[requests], ((0, 0), (0, -M % block_pages)))
        q = q.reshape(*q.shape[:2], K, N // K, H).transpose(0, 2, 3, 1, 4)

        def key_block(j, state):
            taken = jax.lax.dynamic_slice_in_dim(tables, j * block_pages, block_pages, axis=1)
            index = (taken[:, None] * K + heads).reshape(-1)
            # Gathered apart: XLA would store keys and values together, and then copy each out of there.
            k, v = (gather(index, column).reshape(-1, K, block, H) for column in (0, pages.shape[3] // 2))
            return update(state, q, k, v, j * block, start, stop, scale=scale, soft_cap=soft_cap)

        occupied = stop > start
        first = jnp.min(jnp.where(occupied, start, M * page_size)) // block
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

    parts = []
    if decode_rows:
        rows = (x[:decode_rows, None] for x in (q, kv_start, kv_stop))
        q_rows, start, stop = rows
        parts.append(attend(q_rows, tile_request[:decode_rows], start, stop))
    if num_tiles:
        size = min(max(1, group_rows // tile_rows), num_tiles)
        tiled = (x[decode_rows:].reshape(num_tiles, tile_rows, *x.shape[1:]) for x in (q, kv_start, kv_stop))
        q_tiles, start, stop = tiled
        tiles = (q_tiles, tile_request[decode_rows:], start, stop)
        padding = -num_tiles % size  # tiles of empty rows
        grouped = [jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]) for x in tiles]
        parts.append(jax.lax.map(group, grouped).reshape(-1, N, H)[: T - decode_rows])
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]
