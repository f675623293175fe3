"""The public call of paged attention, its checks, and its implementations by name."""

import math

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import pallas_gpu, pallas_tpu, reference, xla
from kernels_pallas.pages import check_pages
from kernels_pallas.platform import select

IMPLEMENTATIONS = {
    "reference": reference.paged_attention,
    "xla": xla.paged_attention,
    "pallas_tpu": pallas_tpu.paged_attention,
    "pallas_gpu": pallas_gpu.paged_attention,
}
"""TPU takes "pallas_tpu", GPUs from A100 on "pallas_gpu", all else "xla"."""


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Float[Array, "P K page_size W"],
    block_tables: Int[Array, "R M"],
    tile_request: Int[Array, " G"],
    kv_start: Int[Array, " T"],
    kv_stop: Int[Array, " T"],
    *,
    decode_rows: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Attention of ragged query rows over their requests' pages.

    The first ``decode_rows`` rows are tiles of one row each, a request's next token say; the others stand in tiles
    of equally many rows. All rows of a tile belong to one request, and a request's last tile is padded. Tiles of one
    request that follow one another hold rows, and key positions, that do. Key position ``j`` of request ``r``
    stands in page ``block_tables[r, j // page_size]`` at ``j % page_size``.

        decode_rows = 2, then requests of 3 and 2 rows in tiles of 2
                 rows  a0 | b7 | c0 c1 | c2 -- | d0 d1
         tile_request   0 |  1 |     2 |     2 |     3

    Args:
      q: query rows, of the pages' dtype.
      pages: this layer's pages (`kernels_pallas.pages`), with the rows' own keys and values already written.
      block_tables: pages of each request, in order; entries past the request's end may hold any page in ``[0, P)``.
      tile_request: row of ``block_tables`` for each tile.
      kv_start, kv_stop: int32, in the request's own key positions; padding rows have ``kv_stop <= kv_start``
        and give zeros.
      decode_rows: static.
      scale, soft_cap: as in `kernels_pallas.interval_attention`.
      implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu"; None picks by platform.
      interpret: run a Pallas kernel as plain JAX, for tests.

    Slots that no row sees may hold anything, NaN included, and so may the queries of padding rows. Not
    differentiable.

    Raises:
      ValueError: shapes or dtypes that do not fit, or (where they are known) values: a page outside ``[0, P)``, a
        request outside ``[0, R)``, an interval outside ``[0, M * page_size]``; an implementation that is not there,
        or ``interpret`` with one that is no Pallas kernel.
      NotImplementedError: quantised pages.
    """
    _check_shapes(q, pages, block_tables, tile_request, kv_start, kv_stop, decode_rows)
    _check_values(pages, block_tables, tile_request, kv_start, kv_stop)
    chosen = select(implementation, IMPLEMENTATIONS)
    return chosen(
        q,
        pages,
        block_tables,
        tile_request,
        kv_start,
        kv_stop,
        decode_rows=decode_rows,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        soft_cap=soft_cap,
        interpret=interpret,
    )


def check_block_tables(block_tables: np.ndarray, num_pages: int) -> None:
    """For the host that makes block tables ``[R, M]``, since a compiled program can't raise.

    Raises:
      ValueError: an entry is outside ``[0, num_pages)``.
    """
    _check_range("block_tables", block_tables, 0, num_pages - 1, "pages")


def _check_shapes(q, pages, block_tables, tile_request, kv_start, kv_stop, decode_rows) -> None:
    if q.ndim != 3 or pages.ndim != 4 or 0 in q.shape or 0 in pages.shape:
        raise ValueError(
            f"expected q [T, N, H] and pages [P, K, page_size, W], no axis 0, got {q.shape} and {pages.shape}"
        )
    check_pages(pages, q.shape[2])
    if q.shape[1] % pages.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads can't share {pages.shape[1]} key heads evenly: q {q.shape}, pages {pages.shape}"
        )
    if q.dtype != pages.dtype:
        raise ValueError(f"q and pages have one dtype, got {q.dtype} and {pages.dtype}")
    ints = {"block_tables": block_tables, "tile_request": tile_request, "kv_start": kv_start, "kv_stop": kv_stop}
    for name, x in ints.items():
        if x.dtype != "int32":
            raise ValueError(f"{name} is int32, got {x.dtype}")
    if block_tables.ndim != 2 or not block_tables.size or tile_request.ndim != 1:
        raise ValueError(
            f"expected block_tables [R, M], neither 0, and tile_request [G], got {block_tables.shape} and "
            f"{tile_request.shape}"
        )
    T, G = len(q), len(tile_request)
    rows, tiles = T - decode_rows, G - decode_rows
    fits = rows % tiles == 0 and rows > 0 if tiles > 0 else rows == tiles == 0
    if not 0 <= decode_rows <= T or not fits:
        raise ValueError(
            f"{G} tiles can't hold T = {T} rows: decode_rows = {decode_rows} tiles of one row, and {tiles} of equally "
            f"many for the {rows} rows that are left"
        )
    if kv_start.shape != (T,) or kv_stop.shape != (T,):
        raise ValueError(f"expected intervals [T = {T}], got {kv_start.shape} and {kv_stop.shape}")


def _check_values(pages, block_tables, tile_request, kv_start, kv_stop) -> None:
    """Checks what is known: an argument of a function that is being traced is not."""
    R, M = block_tables.shape
    keys = M * pages.shape[2]
    _check_range("block_tables", block_tables, 0, len(pages) - 1, "pages")
    _check_range("tile_request", tile_request, 0, R - 1, "rows of block_tables")
    _check_range("kv_start", kv_start, 0, keys, "key positions")
    _check_range("kv_stop", kv_stop, 0, keys, "key positions")


def _check_range(name: str, values, least: int, most: int, what: str) -> None:
    if isinstance(values, Tracer):
        return
    values = np.asarray(values)
    if not values.size or (values.min() >= least and values.max() <= most):
        return
    index = tuple(int(i) for i in np.argwhere((values < least) | (values > most))[0])
    place = ", ".join(map(str, index))
    raise ValueError(f"{name}[{place}] = {values[index]} is outside {what} {least} to {most}")
