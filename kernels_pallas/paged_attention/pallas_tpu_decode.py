"""Paged attention of decode rows for TPU (Mosaic): one query row a request, pages copied as they are needed.

Pages stay in main memory. A request's pages, from the first that its row sees to the last, are taken in blocks; a
block's pages are copied each as one run of bytes into one of several buffers, while earlier blocks are computed. The
copies run ahead over the ends of requests, so that a short request costs no wait of its own:

    rows (keys)         a (600)                b (100)  c (0)  d (300)
    blocks of 256       a0     a1     a2       b0              d0     d1
    while computing     a0: copy a2            a2: copy d0 (c has no block)

A request's query heads that share a key head are the rows of a matrix product, filled up to a tile; several key heads
are computed in one body, so that products of one stand beside the softmax of another. Only the blocks at the ends of
what a row sees are masked. Online softmax (https://arxiv.org/abs/1805.02867) in base 2 and float32.

Where a key and its value share 128 lanes (heads of up to 64, `kernels_pallas.pages`), products take both at once: a
query filled up with zeros leaves the value out of its score, and the output stands in the upper lanes.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs
from kernels_pallas.main_memory import stay_in_main_memory

LOWEST = -1e30
"""Score of a key that a row does not see: finite, so that differences of two make no NaN."""
LOG2_E = math.log2(math.e)
LANES, SUBLANES = 128, 8
DTYPES = ("bfloat16", "float32")

BUFFER_BYTES = 8 * 2**20
"""For all buffers of pages; a v4 has 16 MiB in all."""
BLOCK_BYTES = 2**21
"""Wanted size of a buffer."""
BLOCK_KEYS = 1024
"""Keys of a block, at most."""
BUFFERS = 4
"""Buffers of one block each: one is computed, the others are being filled."""
SEMAPHORES = 4
"""For a buffer; the compiler's model lets copies that share one wait for one another."""
HEADS = 8
"""Key heads computed in one body, at most."""
ROWS = 16
"""Query rows of a grid step, at most."""
ROW_BYTES = 2**18
"""Of a grid step's queries, at most, where one row is less."""
SHARDS = 2
"""Parts of the rows that a chip with two cores gives to one each."""
TABLE_WORDS = 2**16
"""Entries of block tables that one call takes into scalar memory, which is 1 MiB at most."""


class _Plan(NamedTuple):
    """What is known while the kernel is traced."""

    num_kv_heads: int
    heads: int  # key heads of one block
    queries: int  # rows of a product: query heads that share a key head, filled up
    page_size: int
    key_width: int  # lanes of a row of pages that a query is multiplied with
    value_column: int
    value_width: int
    block_pages: int
    short_keys: int  # of the smaller body, for blocks that are half empty
    buffers: int
    parts: int  # copies of a page, each of some heads
    semaphores: int
    rows: int  # of one grid step
    shards: int
    shard_rows: int
    table_width: int
    scale: float
    soft_cap: float | None

    @property
    def groups(self) -> int:
        """Steps that all key heads take."""
        return self.num_kv_heads // self.heads

    @property
    def block_keys(self) -> int:
        return self.block_pages * self.page_size

    @property
    def total_rows(self) -> int:
        return self.shards * self.shard_rows


class _Rows(NamedTuple):
    """The scalars of each row, int32 ``[total rows]`` but the last."""

    table: jax.Array | np.ndarray  # where its first page stands in the flat block tables
    pages: jax.Array | np.ndarray  # how many it sees something of
    key: jax.Array | np.ndarray  # position of its first page's first key
    start: jax.Array | np.ndarray
    stop: jax.Array | np.ndarray
    following: (
        jax.Array | np.ndarray
    )  # [shards * (shard rows + 1)]: first row from here on that sees a key, or the total


def decode(q, pages, block_tables, request, kv_start, kv_stop, *, scale, soft_cap=None, interpret=False, measured=None):
    """Attention ``[D, N, H]`` of D decode rows over their requests' pages.

    Args:
      q: ``[D, N, H]``, of the pages' dtype.
      pages: ``[P, K, page_size, W]``.
      block_tables: int32 ``[R, M]``.
      request: int32 ``[D]``, each row's request.
      kv_start, kv_stop: int32 ``[D]``; a row with ``kv_stop <= kv_start`` gives zeros and reads no page.
      scale, soft_cap: as in `kernels_pallas.interval_attention`.
      interpret: True, or `pltpu.InterpretParams`.
      measured: ``(kv_start, kv_stop)`` as NumPy arrays, which the kernel stores over its own: for the compiler's
        estimate of cycles alone, which takes scalars that are not known for zeros.

    Raises:
      NotImplementedError: dtypes, page sizes or row widths that the kernel can't take.
    """
    check(q, pages)
    D, M = len(q), block_tables.shape[1]
    if M > TABLE_WORDS:
        raise NotImplementedError(f"block tables have at most {TABLE_WORDS} pages a request here, got {M}")
    call = functools.partial(_call, scale=scale, soft_cap=soft_cap, interpret=interpret)
    if block_tables.size <= TABLE_WORDS:
        return call(q, pages, block_tables, request, kv_start, kv_stop, measured=measured)
    size = TABLE_WORDS // M
    outs = []
    for first in range(0, D, size):
        part = slice(first, first + size)
        tables = block_tables[request[part]]
        own = jnp.arange(len(tables), dtype=jnp.int32)
        known = None if measured is None else tuple(x[part] for x in measured)
        outs.append(call(q[part], pages, tables, own, kv_start[part], kv_stop[part], measured=known))
    return jnp.concatenate(outs)


def check(q, pages) -> None:
    """Raise where TPU's kernels can't take these pages.

    Raises:
      NotImplementedError: with what is given and what is possible.
    """
    page_size, W = pages.shape[2:]
    if pages.dtype not in DTYPES or q.dtype != pages.dtype:
        raise NotImplementedError(
            f"q and pages have one dtype on TPU, {' or '.join(DTYPES)}, got {q.dtype} and {pages.dtype}"
        )
    tile = SUBLANES * 4 // pages.dtype.itemsize
    if page_size % LANES and (LANES % page_size or page_size < tile):
        raise NotImplementedError(
            f"page sizes of {pages.dtype} on TPU are powers of two from {tile} to {LANES}, or multiples of "
            f"{LANES}, got {page_size}"
        )
    if W % LANES or (W > LANES and W % (2 * LANES)):
        raise NotImplementedError(f"rows of pages on TPU have W = 128, or a multiple of 256, got {W}")


def _call(q, pages, block_tables, request, kv_start, kv_stop, *, scale, soft_cap, interpret, measured):
    D, N, H = q.shape
    K, G = pages.shape[1], N // pages.shape[1]
    plan = _plan(q.shape, pages, block_tables.shape[1], scale, soft_cap)
    fill = plan.total_rows - D
    request, kv_start, kv_stop = (jnp.pad(x, (0, fill)) for x in (request, kv_start, kv_stop))
    rows = _rows(plan, request, kv_start, kv_stop)
    if measured is not None:
        start, stop = (np.pad(np.asarray(x, np.int32), (0, fill)) for x in measured)
        measured = _rows(plan, np.zeros(plan.total_rows, np.int32), start, stop)
    padded = jnp.pad(q.reshape(D, K, G, H), ((0, fill), (0, 0), (0, plan.queries - G), (0, plan.key_width - H)))
    steps = plan.shard_rows // plan.rows

    def spec(width):
        return pl.BlockSpec((plan.rows, K, plan.queries, width), lambda s, i, *_: (s * steps + i, 0, 0, 0))

    state = (plan.heads, plan.queries)
    buffers = (plan.buffers, plan.block_pages, plan.heads, plan.page_size, pages.shape[3])
    out = pl.pallas_call(
        functools.partial(_kernel, plan, measured),
        out_shape=jax.ShapeDtypeStruct((plan.total_rows, K, plan.queries, plan.value_width), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(rows),
            grid=(plan.shards, steps),
            in_specs=[spec(plan.key_width), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=spec(plan.value_width),
            scratch_shapes=[
                pltpu.VMEM(buffers, pages.dtype),
                pltpu.SemaphoreType.DMA((plan.buffers, plan.semaphores)),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, plan.value_width), jnp.float32),
                pltpu.SMEM((5,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=costs.paged_decode(q, pages, plan.table_width),
        interpret=interpret,
        name="paged_attention_decode",
    )(
        block_tables.reshape(-1),
        *rows,
        padded,
        stay_in_main_memory(pages, unless=bool(interpret) or measured is not None),
    )
    column = pages.shape[3] // 2 if plan.value_column == 0 else 0
    return out[:D, :, :G, column : column + H].reshape(D, N, H)


def _plan(q_shape, pages, table_width: int, scale: float, soft_cap: float | None) -> _Plan:
    D, N, _ = q_shape
    _, K, page_size, W = pages.shape
    itemsize = pages.dtype.itemsize
    least = max(page_size, LANES)  # keys of a block, as scores fill lanes
    # A block of all heads may be larger than a buffer can be; then heads go in smaller groups.
    divisors = [h for h in range(1, min(K, HEADS) + 1) if K % h == 0]
    heads = max([h for h in divisors if BUFFERS * h * least * W * itemsize <= BUFFER_BYTES], default=1)
    key_bytes = heads * W * itemsize
    keys = min(BLOCK_BYTES // key_bytes, BLOCK_KEYS, pl.cdiv(table_width * page_size, least) * least)
    block_keys = max(keys // least * least, least)
    block_pages = block_keys // page_size
    parts = 1
    while block_pages * parts < SEMAPHORES and heads % (2 * parts) == 0:
        parts *= 2
    divisors = [x for x in range(1, SEMAPHORES + 1) if block_pages % x == 0]
    halves = block_pages % 2 == 0 and block_keys % (2 * LANES) == 0
    queries = pl.cdiv(N // K, SUBLANES) * SUBLANES
    wide = W > LANES
    width = W // 2 if wide else W
    shards = min(SHARDS, D)
    rows = max(1, min(ROWS, pl.cdiv(D, shards), ROW_BYTES // (K * queries * width * itemsize)))
    return _Plan(
        num_kv_heads=K,
        heads=heads,
        queries=queries,
        page_size=page_size,
        key_width=width,
        value_column=W // 2 if wide else 0,
        value_width=width,
        block_pages=block_pages,
        short_keys=block_keys // 2 if halves else block_keys,
        buffers=max(2, min(BUFFERS, BUFFER_BYTES // (block_keys * key_bytes))),
        parts=parts,
        semaphores=max(divisors) if parts == 1 else block_pages * parts,
        rows=rows,
        shards=shards,
        shard_rows=pl.cdiv(D, shards * rows) * rows,
        table_width=table_width,
        scale=float(scale),
        soft_cap=soft_cap,
    )


def _rows(plan: _Plan, request, start, stop) -> _Rows:
    xp = np if isinstance(start, np.ndarray) else jnp
    sees = stop > start
    first = start // plan.page_size
    count = xp.where(sees, (stop + (plan.page_size - 1)) // plan.page_size - first, 0)
    row = np.arange(plan.total_rows, dtype=np.int32)
    shard = row.reshape(plan.shards, plan.shard_rows)
    here = shard[:, :1] + np.arange(plan.shard_rows + 1, dtype=np.int32)[None]
    later = (shard[:, None] >= here[:, :, None]) & sees.reshape(shard.shape)[:, None]
    following = xp.where(later, shard[:, None], plan.total_rows).min(axis=-1)
    table = request * plan.table_width + first
    fields = (table, count, first * plan.page_size, start, stop, following.reshape(-1))
    return _Rows(*(x.astype(np.int32) for x in fields))


def _kernel(plan: _Plan, measured, tables_ref, *refs):
    rows = _Rows(*refs[: len(_Rows._fields)])
    q_ref, pages_ref, out_ref, buffer, semaphores, maxima, totals, values, cursor = refs[len(_Rows._fields) :]
    shard, step = pl.program_id(0), pl.program_id(1)
    if measured is not None:

        @pl.when((shard == 0) & (step == 0))
        def _():
            for ref, known in zip(rows, measured, strict=True):
                for i, x in enumerate(known):
                    ref[i] = jnp.int32(int(x))

    def copy(slot, page, place, part, group):
        """The copy of one part of a page's heads to its place in a buffer."""
        size = plan.heads // plan.parts
        source = pages_ref.at[page, pl.ds(group * plan.heads + part * size, size)]
        target = buffer.at[slot, place, pl.ds(part * size, size)]
        number = (place * plan.parts + part) % plan.semaphores
        return pltpu.make_async_copy(source, target, semaphores.at[slot, number])

    def start(slot, base, count, group):
        """Start the copies of a block of ``count`` pages that stand in the block tables from ``base`` on."""

        def page(place):
            for part in range(plan.parts):
                copy(slot, tables_ref[base + place], place, part, group).start()

        @pl.when(count == plan.block_pages)
        def _():
            for place in range(plan.block_pages):
                page(place)

        pl.when(count != plan.block_pages)(lambda: pl.loop(0, count)(page))

    def wait(slot, count):
        def page(place):
            for part in range(plan.parts):
                copy(slot, 0, place, part, 0).wait()

        @pl.when(count == plan.block_pages)
        def _():
            if plan.parts > 1:
                for place in range(plan.block_pages):
                    page(place)
                return
            for number in range(plan.semaphores):  # for all of its bytes at once
                some = buffer.at[slot, pl.ds(0, plan.block_pages // plan.semaphores)]
                pltpu.make_async_copy(some, some, semaphores.at[slot, number]).wait()

        pl.when(count != plan.block_pages)(lambda: pl.loop(0, count)(page))

    def count_of(row, block):
        return jnp.minimum(rows.pages[row] - block * plan.block_pages, plan.block_pages)

    def copy_next():
        """Start the copies of the block at the cursor, which goes on to the next."""
        row, group, block, slot = (cursor[i] for i in range(4))

        @pl.when(row < plan.total_rows)
        def _():
            base = rows.table[row] + block * plan.block_pages
            start(slot, base, count_of(row, block), group)
            ends = (block + 1) * plan.block_pages >= rows.pages[row]
            leaves = ends & (group == plan.groups - 1)
            cursor[0] = jnp.where(leaves, rows.following[row + 1 + shard], row)
            cursor[1] = jnp.where(leaves, 0, jnp.where(ends, group + 1, group))
            cursor[2] = jnp.where(ends, 0, block + 1)
            cursor[3] = jnp.where(slot == plan.buffers - 1, 0, slot + 1)

    @pl.when(step == 0)
    def _():
        cursor[0] = rows.following[shard * (plan.shard_rows + 1)]
        for i in range(1, 5):
            cursor[i] = 0
        pl.loop(0, plan.buffers - 1)(lambda _: copy_next())

    def compute(slot, queries, position, first, last, keys, masked):
        """Take in the first ``keys`` keys of a block, at ``position ..``; seen are those in ``[first, last)``."""
        some = (slot, slice(keys // plan.page_size))

        def seen(shape, axis):
            at = position + lax.broadcasted_iota(jnp.int32, shape, axis)
            return (at >= first) & (at < last)

        def scores(h):
            k = buffer[*some, h, :, : plan.key_width].reshape(keys, plan.key_width)
            s = _dot(queries(h), k, 1)
            if plan.soft_cap is None:
                s = s * (plan.scale * LOG2_E)
            else:
                s = jnp.tanh(s * (plan.scale / plan.soft_cap)) * (plan.soft_cap * LOG2_E)
            return jnp.where(seen(s.shape, 1), s, LOWEST) if masked else s

        def weights(h, s):
            old = maxima[h]
            new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
            decay = jnp.exp2(old - new)
            p = jnp.exp2(s - _wide(new, keys))
            maxima[h] = new
            totals[h] = totals[h] * decay + sum(p[:, i : i + LANES] for i in range(0, keys, LANES))
            return p.astype(buffer.dtype), decay

        def add(h, p, decay):
            v = buffer[*some, h, :, plan.value_column :].reshape(keys, plan.value_width)
            if masked:  # weights are 0 where nothing is seen, but 0 * NaN is NaN
                v = jnp.where(seen(v.shape, 0), v.astype(jnp.float32), 0.0).astype(v.dtype)
            values[h] = values[h] * _wide(decay, plan.value_width) + _dot(p, v, 0)

        # Heads side by side, so that the latency of one's reductions is hidden behind the others.
        heads = range(plan.heads)
        s = [scores(h) for h in heads]
        p = [weights(h, s[h]) for h in heads]
        for h in heads:
            add(h, *p[h])

    @pl.loop(0, plan.rows)
    def _(place):
        row = (shard * plan.shard_rows + step * plan.rows) + place
        count, first, last, key = rows.pages[row], rows.start[row], rows.stop[row], rows.key[row]

        @pl.when(count == 0)
        def _():
            out_ref[place] = jnp.zeros(out_ref.shape[1:], out_ref.dtype)

        @pl.when(count > 0)
        def _():
            @pl.loop(0, plan.groups)
            def _(group):
                maxima[...] = jnp.full_like(maxima, LOWEST)
                totals[...] = jnp.zeros_like(totals)
                values[...] = jnp.zeros_like(values)

                @pl.loop(0, pl.cdiv(count, plan.block_pages))
                def _(block):
                    copy_next()
                    slot = cursor[4]
                    cursor[4] = jnp.where(slot == plan.buffers - 1, 0, slot + 1)
                    wait(slot, count_of(row, block))
                    position = key + block * plan.block_keys
                    free = (position >= first) & (position + plan.block_keys <= last)
                    short = (last - position <= plan.short_keys) & (plan.short_keys < plan.block_keys)

                    def queries(h):
                        return q_ref[place, group * plan.heads + h]

                    take = functools.partial(compute, slot, queries, position, first, last)
                    pl.when(free)(lambda: take(plan.block_keys, False))
                    pl.when(~free & ~short)(lambda: take(plan.block_keys, True))
                    if plan.short_keys < plan.block_keys:
                        pl.when(short)(lambda: take(plan.short_keys, True))

                for h in range(plan.heads):
                    total = jnp.sum(totals[h], axis=1, keepdims=True)
                    out_ref[place, group * plan.heads + h] = (values[h] / total).astype(out_ref.dtype)


def _dot(a, b, contracted: int):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _wide(x, width: int):
    """``x`` of one value a row, in ``width`` lanes."""
    return x if width == LANES else jnp.tile(x, (1, width // LANES))
