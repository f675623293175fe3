"""The oracle: gather each row's keys and values, then the dense oracle row by row."""

import jax.numpy as jnp

from kernels_pallas.interval_attention import reference as dense


def paged_attention(q, k_pages, v_pages, block_tables, tile_request, kv_start, kv_stop, *, scale, soft_cap=None):
    """See `kernels_pallas.paged_attention.paged_attention`; gathers all keys of every row."""
    rows_per_tile = q.shape[0] // tile_request.shape[0]
    tables = block_tables[jnp.repeat(tile_request, rows_per_tile)]  # [T, M]
    k, v = (pages[tables].reshape(len(q), -1, *pages.shape[2:]) for pages in (k_pages, v_pages))
    out = dense.interval_attention(
        q[:, None], k, v, kv_start[:, None], kv_stop[:, None], scale=scale, soft_cap=soft_cap
    )
    return out[:, 0]
