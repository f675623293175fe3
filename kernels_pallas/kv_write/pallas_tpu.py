"""New keys and values into pages on TPU (Mosaic): tiles that rows go to are read, changed and written back, in place.

Main memory is written in tiles of 16 rows of bfloat16 or 8 of float32, so that a row can't be written alone. Rows are
put in the order of their slots, and rows of one tile, its heads together, are written at once; nothing else writes
that tile, whatever order the copies end in. A chunk of prefill fills whole tiles, a token of decode changes one:

    slots (tiles of 16)   32 33 34 | 48 | 7          written  7 | 32 33 34 | 48

Copies of some tiles, in and out, go on while another is changed. The new rows are copied to their places in a tile by
the same means, each with all heads; the tile's heads then take them by a strided load.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs
from kernels_pallas.main_memory import stay_in_main_memory
from kernels_pallas.pages import LANES, join

DTYPES = ("bfloat16", "float32")
BUFFER_BYTES = 6 * 2**20
"""For all buffers; a v4 has 16 MiB in all."""
BUFFERS = 16
"""Tiles in flight, at most."""
SLOTS = 2**15
"""Rows that one call takes, for their slots stand in scalar memory."""


class _Order(NamedTuple):
    """Rows in the order of their slots, int32 ``[T]`` each; dropped rows come last."""

    slot: jax.Array | np.ndarray
    row: jax.Array | np.ndarray
    end: jax.Array | np.ndarray  # where the next tile's rows begin
    tiles: jax.Array | np.ndarray  # [1]: how many tiles there are


def kv_write(pages, k, v, slots, *, interpret=False, measured=None):
    """See `kernels_pallas.kv_write.kv_write`.

    Args:
      measured: ``slots`` as a NumPy array, which the kernel stores over its own: for the compiler's estimate of
        cycles alone, which takes scalars that are not known for zeros.

    Raises:
      NotImplementedError: dtypes, page sizes or row widths that the kernel can't take.
    """
    page_size, W = pages.shape[2:]
    tile = 32 // pages.dtype.itemsize
    if pages.dtype not in DTYPES:
        raise NotImplementedError(f"pages on TPU are {' or '.join(DTYPES)}, got {pages.dtype}")
    if page_size % tile:
        raise NotImplementedError(f"page sizes of {pages.dtype} on TPU are multiples of {tile}, got {page_size}")
    if W % LANES:
        raise NotImplementedError(f"rows of pages on TPU have W a multiple of {LANES}, got {W}")
    write = functools.partial(_write, interpret=interpret)
    if len(slots) <= SLOTS:
        return write(pages, k, v, slots, measured=measured)
    for first in range(0, len(slots), SLOTS):
        part = slice(first, first + SLOTS)
        pages = write(pages, k[part], v[part], slots[part], measured=None if measured is None else measured[part])
    return pages


def _write(pages, k, v, slots, *, interpret, measured):
    (P, K, page_size, W), T = pages.shape, len(slots)
    if not T:
        return pages
    tile = 32 // pages.dtype.itemsize
    # float32 holds either dtype, and its rows can be loaded with a stride.
    rows = join(k.astype(pages.dtype), v.astype(pages.dtype), W).astype(jnp.float32)
    tile_bytes = tile * K * W * (pages.dtype.itemsize + 4)
    buffers = max(3, min(BUFFERS, BUFFER_BYTES // tile_bytes))
    order = _order(slots, P * page_size, tile)
    measured = None if measured is None else _order(measured, P * page_size, tile)
    return pl.pallas_call(
        functools.partial(_kernel, page_size, tile, buffers, measured),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(order),
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((buffers, K, tile, W), pages.dtype),
                pltpu.VMEM((buffers, tile, K, W), jnp.float32),
                pltpu.SemaphoreType.DMA((3, buffers)),
            ],
        ),
        input_output_aliases={len(order) + 1: 0},
        cost_estimate=costs.kv_write(pages, T),
        interpret=interpret,
        name="kv_write",
    )(*order, rows, stay_in_main_memory(pages, unless=bool(interpret) or measured is not None))


def _order(slots, capacity: int, tile: int) -> _Order:
    xp = np if isinstance(slots, np.ndarray) else jnp
    T = len(slots)
    place = np.arange(T, dtype=np.int32)
    slots = xp.minimum(slots, capacity)
    if xp is np:
        row = np.argsort(slots, kind="stable").astype(np.int32)
        slot = slots[row]
    else:
        slot, row = lax.sort((slots, jnp.asarray(place)), num_keys=1)
    changes = xp.concatenate([slot[1:] // tile != slot[:-1] // tile, np.ones(1, bool)])
    end = xp.where(changes, place + 1, T)
    end = np.minimum.accumulate(end[::-1])[::-1] if xp is np else lax.cummin(end, reverse=True)
    tiles = (changes & (slot < capacity)).sum(dtype=np.int32)
    return _Order(slot, row, end.astype(np.int32), tiles[None])


def _kernel(page_size: int, tile: int, buffers: int, measured, *refs):
    order = _Order(*refs[:4])
    rows_ref, _, pages_ref, old, new, semaphores = refs[4:]  # pages are read through the output, which they are
    if measured is not None:
        for ref, known in zip(order, measured, strict=True):
            for i, x in enumerate(known):
                ref[i] = jnp.int32(int(x))
    ahead = buffers // 2

    def slab(first):
        """The tile, all heads, of the rows that begin at ``first`` in the order."""
        slot = order.slot[first]
        offset = lax.div(lax.rem(slot, page_size), tile) * tile
        return pages_ref.at[lax.div(slot, page_size), :, pl.ds(pl.multiple_of(offset, tile), tile)]

    def read(number, first):
        """Start copying the tile and its new rows in; gives where the next tile's rows begin."""
        buffer, end = lax.rem(number, buffers), order.end[first]

        @pl.when(number >= buffers)
        def _():
            pltpu.make_async_copy(old.at[buffer], slab(0), semaphores.at[2, buffer]).wait()

        pltpu.make_async_copy(slab(first), old.at[buffer], semaphores.at[0, buffer]).start()

        @pl.loop(first, end)
        def _(i):
            place = lax.rem(order.slot[i], tile)
            pltpu.make_async_copy(rows_ref.at[order.row[i]], new.at[buffer, place], semaphores.at[1, buffer]).start()

        return end

    def change(number, first):
        buffer, end = lax.rem(number, buffers), order.end[first]
        pltpu.make_async_copy(slab(first), old.at[buffer], semaphores.at[0, buffer]).wait()

        def row(i, changed):
            pltpu.make_async_copy(rows_ref.at[0], new.at[buffer, 0], semaphores.at[1, buffer]).wait()
            return changed | (1 << lax.rem(order.slot[i], tile))

        changed = lax.fori_loop(first, end, row, jnp.int32(0))
        places = lax.broadcasted_iota(jnp.int32, old.shape[2:], 0)
        mask = (lax.shift_right_logical(jnp.broadcast_to(changed, places.shape), places) & 1) == 1
        for h in range(old.shape[1]):
            value = jnp.where(mask, new[buffer, :, h], old[buffer, h].astype(jnp.float32))
            old[buffer, h] = value.astype(old.dtype)
        pltpu.make_async_copy(old.at[buffer], slab(first), semaphores.at[2, buffer]).start()
        return end

    tiles = order.tiles[0]
    reading = lax.fori_loop(0, jnp.minimum(ahead, tiles), read, jnp.int32(0))

    def step(number, cursors):
        first, reading = cursors
        reading = lax.cond(number + ahead < tiles, lambda: read(number + ahead, reading), lambda: reading)
        return change(number, first), reading

    lax.fori_loop(0, tiles, step, (jnp.int32(0), reading))

    @pl.loop(jnp.maximum(tiles - buffers, 0), tiles)
    def _(number):
        buffer = lax.rem(number, buffers)
        pltpu.make_async_copy(old.at[buffer], slab(0), semaphores.at[2, buffer]).wait()
