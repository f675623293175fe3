"""The public call of paged attention, its checks, and its implementations by name."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import reference, xla
from kernels_pallas.platform import select

IMPLEMENTATIONS = {"reference": reference.paged_attention, "xla": xla.paged_attention}


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P page_size K H"],
    v_pages: Float[Array, "P page_size K H"],
    block_tables: Int[Array, "R M"],
    tile_request: Int[Array, " G"],
    kv_start: Int[Array, " T"],
    kv_stop: Int[Array, " T"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Attention of ragged query rows over their requests' pages.

    The T rows stand in G tiles of ``T // G`` rows; all rows of a tile belong to one request, and a request's
    last tile is padded. Decode is G = T, one row a tile. Key position ``j`` of request ``r`` stands in page
    ``block_tables[r, j // page_size]`` at ``j % page_size``.

        two requests of 3 and 2 rows, tiles of 2:   rows  a0 a1 | a2 -- | b0 b1
                                            tile_request      0 |     0 |     1

    Args:
      q: query rows; k_pages, v_pages: this layer's pages, with the rows' own keys already written.
      block_tables: pages of each request, in order; entries past the request's end may hold any page.
      tile_request: row of ``block_tables`` for each tile.
      kv_start, kv_stop: int32, in the request's own key positions; padding rows have ``kv_stop <= kv_start``
        and give zeros.
      scale, soft_cap, implementation: as in `kernels_pallas.interval_attention`.

    Slots that no row sees may hold anything, NaN included. Not differentiable.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that is not there.
    """
    _check(q, k_pages, v_pages, block_tables, tile_request, kv_start, kv_stop)
    chosen = select(implementation, IMPLEMENTATIONS)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return chosen(q, k_pages, v_pages, block_tables, tile_request, kv_start, kv_stop, scale=scale, soft_cap=soft_cap)


def _check(q, k_pages, v_pages, block_tables, tile_request, kv_start, kv_stop) -> None:
    shapes = f"q {q.shape}, k_pages {k_pages.shape}, v_pages {v_pages.shape}"
    if q.ndim != 3 or k_pages.ndim != 4 or k_pages.shape != v_pages.shape or q.shape[2] != k_pages.shape[3]:
        raise ValueError(f"expected q [T, N, H] and pages [P, page_size, K, H], got {shapes}")
    if q.shape[1] % k_pages.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k_pages.shape[2]} key heads evenly: {shapes}")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k_pages, v_pages)):
        raise ValueError(f"q and pages are floating point, got {q.dtype}, {k_pages.dtype}, {v_pages.dtype}")
    tiles = tile_request.shape[0] if tile_request.ndim == 1 else 0
    if block_tables.ndim != 2 or not tiles or q.shape[0] % tiles:
        raise ValueError(
            f"expected block_tables [R, M] and tile_request [G] with G dividing T = {q.shape[0]}, got "
            f"{block_tables.shape} and {tile_request.shape}"
        )
    if kv_start.shape != q.shape[:1] or kv_stop.shape != q.shape[:1]:
        raise ValueError(f"expected intervals [T = {q.shape[0]}], got {kv_start.shape}, {kv_stop.shape}")
    for name, x in {
        "block_tables": block_tables,
        "tile_request": tile_request,
        "kv_start": kv_start,
        "kv_stop": kv_stop,
    }.items():
        if x.dtype != "int32":
            raise ValueError(f"{name} is int32, got {x.dtype}")
