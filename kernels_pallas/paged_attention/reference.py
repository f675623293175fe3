"""The oracle: gather each row's keys and values, then the dense oracle row by row."""

import jax.numpy as jnp

from kernels_pallas.interval_attention import interval_attention
from kernels_pallas.pages import split
from kernels_pallas.platform import refuse_interpret


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
):
    """See `kernels_pallas.paged_attention.paged_attention`; gathers all keys of every row."""
    refuse_interpret("reference", interpret)
    tiles = len(tile_request) - decode_rows
    tile_rows = (len(q) - decode_rows) // max(tiles, 1)
    request = jnp.concatenate([tile_request[:decode_rows], jnp.repeat(tile_request[decode_rows:], tile_rows)])
    gathered = pages[block_tables[request]]  # [T, M, K, page_size, W]
    gathered = gathered.transpose(0, 1, 3, 2, 4).reshape(len(q), -1, pages.shape[1], pages.shape[3])
    k, v = split(gathered, q.shape[2])
    rows = (q, k, v, kv_start, kv_stop)
    q, k, v, kv_start, kv_stop = (x if x.ndim == 4 else x[:, None] for x in rows)
    out = interval_attention(q, k, v, kv_start, kv_stop, scale=scale, soft_cap=soft_cap, implementation="reference")
    return out[:, 0]
