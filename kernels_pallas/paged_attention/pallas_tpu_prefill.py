"""Paged attention of prefill rows for TPU (Mosaic): blocks of query rows, keys copied page by page as they are needed.

A program owns a block of query rows of some heads. The rows may belong to several requests, and each run of rows of
one request, a *segment*, walks the pages that its rows see, in blocks of keys:

    rows       | a a a a a a | a a b b - d |     "-" sees nothing
    segments   | a           | a   b     d |
    keys       | a0 a1       | a0 a1 a2 b0 d0 d1

A block of keys that all occupied rows of the program see goes without a mask in one large tile; any other goes in small
pieces of rows and keys, where rows see something. `kernels_pallas.tpu_tiles` has what is done with one tile. While a
block of keys is computed the next ones are copied, over the ends of segments and of programs.

Rows of other requests see nothing of a segment: their weights are 0. As 0 * NaN is NaN, values that no row of the
segment sees are cleared at the ends of what it sees; what stands between is written.
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs
from kernels_pallas.main_memory import stay_in_main_memory
from kernels_pallas.paged_attention.pallas_tpu_decode import TABLE_WORDS, check
from kernels_pallas.tpu_tiles import LANES, LOWEST, Across, Blocks, Down, Problem, Refs, scratch_shapes, visit

__all__ = ["prefill"]

BUFFERS = 3
"""Blocks of keys in VMEM: one is computed, the others are being filled."""
NOWHERE = 2**30
"""After every key position."""
INTERPRETED_VMEM = 64 * 2**20
"""What interpret mode takes for the size of VMEM."""
WIDE_UNIT = 256
"""Columns of a matrix unit (from v6e on) that heads of 128 don't fill: tiles go across."""
BLOCKS = {
    False: Blocks(
        across=False, rows=512, parts=1, keys=512, edge_rows=256, edge_keys=256, heads=8, step=256, resident=512
    ),
    True: Blocks(
        across=True, rows=512, parts=1, keys=512, edge_rows=256, edge_keys=512, heads=8, step=256, resident=512
    ),
}
"""The cheapest by the compiler's estimate, by whether tiles go across."""


class Chip(NamedTuple):
    """What blocks are chosen by: whether tiles go across, and bytes of VMEM."""

    across: bool
    vmem: int


class _Plan(NamedTuple):
    """What is known while the kernel is traced."""

    problem: Problem
    page_size: int
    unit: int  # keys of one copy
    table_width: int
    tables_in_smem: bool  # all of them; else the row of the segment that is copied
    buffers: int
    shares: int  # head sets that read the same key heads

    @property
    def blocks(self) -> Blocks:
        return self.problem.blocks

    @property
    def pieces(self) -> int:
        """Pieces of rows at an edge, in a program."""
        return self.blocks.owned // self.blocks.edge_rows

    @property
    def units(self) -> int:
        """Copies of a block of keys."""
        return self.blocks.keys // self.unit


class _Segments(NamedTuple):
    """Runs of rows of one request within a program, programs one after another and each with room for ``most``.

    Attributes:
      count: how many a program has, ``[programs]``.
      following: the first program from here on that has any, or the number of programs, ``[programs + 1]``.
      fields: ``[len(FIELDS) + 2 * pieces, programs * most]``, the last being low and high of each piece of rows.
    """

    count: jax.Array | np.ndarray
    following: jax.Array | np.ndarray
    fields: jax.Array | np.ndarray


FIELDS = ("request", "first", "last", "low", "high", "free_low", "free_high")
"""What is known of a segment: its row of the block tables; its rows ``[first, last)`` of the program; key positions
``[low, high)`` that hold all that its rows see, and ``[free_low, free_high)`` that all of them see."""
SIGNS = (1, 1, -1, 1, -1, -1, 1)
"""1 where the least of the rows' values counts, -1 where the largest does."""


def prefill(
    q,
    pages,
    block_tables,
    tile_request,
    kv_start,
    kv_stop,
    *,
    scale,
    soft_cap=None,
    interpret=False,
    blocks=None,
    measured=None,
):
    """Attention ``[T, N, H]`` of rows in tiles over their requests' pages.

    Args:
      q: ``[T, N, H]``, of the pages' dtype.
      pages: ``[P, K, page_size, W]``.
      block_tables: int32 ``[R, M]``.
      tile_request: int32 ``[tiles]``, the request of each ``T / tiles`` rows.
      kv_start, kv_stop: int32 ``[T]``; a row with ``kv_stop <= kv_start`` gives zeros.
      scale, soft_cap: as in `kernels_pallas.interval_attention`.
      interpret: True, or `pltpu.InterpretParams`.
      blocks: how to cut the problem; None takes what suits the device.
      measured: ``(tile_request, kv_start, kv_stop)`` as NumPy arrays, for the compiler's estimate of cycles alone,
        which takes scalars that are not known for zeros.

    Raises:
      NotImplementedError: dtypes, page sizes or row widths that the kernel can't take.
    """
    check(q, pages)
    T, N, H = q.shape
    K, page_size, W = pages.shape[1:]
    stored = W if W == LANES else W // 2
    chip = Chip(False, INTERPRETED_VMEM)
    if not interpret:
        info = pltpu.get_tpu_info()
        chip = Chip(info.mxu_column_size >= WIDE_UNIT, info.vmem_capacity_bytes * 3 // 4)
    blocks = blocks or blocks_for(chip, T, N // K, W, q.dtype.itemsize)
    heads, kv_heads = _heads(N // K, K, blocks.heads)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    problem = Problem(blocks, heads, kv_heads, stored, True, soft_cap, precision)
    unit = math.gcd(page_size, blocks.keys)
    M = block_tables.shape[1]
    if M > TABLE_WORDS:
        raise NotImplementedError(f"block tables have at most {TABLE_WORDS} pages a request here, got {M}")
    fits = block_tables.size <= TABLE_WORDS
    plan = _Plan(problem, page_size, unit, M, fits, BUFFERS, max(1, N // K // heads))

    factor = scale * math.log2(math.e) if soft_cap is None else scale / soft_cap
    q = (q.astype(jnp.float32) * jnp.float32(factor)).astype(q.dtype)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, stored - H))).reshape(T, N * stored)
    known = None
    if measured is not None:
        request, *intervals = (np.asarray(x, np.int32) for x in measured)
        known = _segments(plan, request, *(np.pad(x, (0, -T % blocks.owned)) for x in intervals), T, np)
    kv_start, kv_stop = (jnp.pad(x, (0, -T % blocks.owned)) for x in (kv_start, kv_stop))
    segments = _segments(plan, tile_request, kv_start, kv_stop, T, jnp)
    out = _call(plan, q, pages, block_tables, segments, kv_start, kv_stop, chip.vmem, interpret, known)
    column = W // 2 if W == LANES else 0
    return out.reshape(T, N, stored)[:, :, column : column + H]


def blocks_for(chip: Chip, num_rows: int, groups: int, width: int, itemsize: int) -> Blocks:
    """How to cut ``num_rows`` query rows, with ``groups`` query heads a key head and rows of pages of ``width``."""
    blocks = BLOCKS[chip.across]
    if width // 2 > LANES:
        blocks = blocks._replace(heads=blocks.heads // 2)
    if num_rows < blocks.rows:
        edge = min(blocks.edge_rows, _up(num_rows, LANES))
        blocks = blocks._replace(rows=_up(num_rows, edge), edge_rows=edge)
    while _bytes(blocks, groups, width, itemsize) > chip.vmem:
        if blocks.heads > 4:
            blocks = blocks._replace(heads=blocks.heads // 2)
        elif blocks.rows > blocks.edge_rows:
            blocks = blocks._replace(rows=blocks.rows // 2 // blocks.edge_rows * blocks.edge_rows)
        elif blocks.heads > 1:
            blocks = blocks._replace(heads=blocks.heads // 2)
        else:
            raise NotImplementedError(f"rows of pages of {width} are too wide for {chip.vmem} bytes of VMEM")
    return blocks


def _bytes(blocks: Blocks, groups: int, width: int, itemsize: int) -> int:
    """VMEM of a program, roughly: keys, rows twice for the pipeline, float32 state and tiles, room for spills."""
    H = max(width // 2, LANES)
    keys = BUFFERS * blocks.keys * max(1, blocks.heads // groups) * width * itemsize
    rows = 2 * 2 * blocks.owned * blocks.heads * H * itemsize
    state = blocks.owned * blocks.heads * (H + (8 if blocks.across else 2 * LANES)) * 4
    return keys + rows + state + 6 * blocks.rows * blocks.keys * 4


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _heads(groups: int, num_kv_heads: int, most: int) -> tuple[int, int]:
    """Query and key heads of a program: a part of a group, or whole groups."""
    if groups >= most:
        return max(n for n in range(1, most + 1) if groups % n == 0), 1
    kv_heads = max(n for n in range(1, most // groups + 1) if num_kv_heads % n == 0)
    return groups * kv_heads, kv_heads


def _segments(plan: _Plan, tile_request, start, stop, num_rows: int, xp) -> _Segments:
    """Segments of rows with intervals ``[T]``, padded to whole programs; ``xp`` is `jax.numpy` or `numpy`."""
    blocks, programs = plan.blocks, len(start) // plan.blocks.owned
    tile_rows = num_rows // len(tile_request)
    size = math.gcd(tile_rows, blocks.edge_rows)  # rows that go together here
    most = blocks.owned // size
    request = xp.repeat(tile_request, tile_rows // size)
    request = xp.pad(request, (0, programs * most - len(request))).reshape(programs, most)
    start, stop = start.reshape(programs, most, size), stop.reshape(programs, most, size)
    sees = stop > start
    low, high = xp.where(sees, start, NOWHERE).min(axis=2), xp.where(sees, stop, 0).max(axis=2)
    free_low, free_high = xp.where(sees, start, 0).max(axis=2), xp.where(sees, stop, NOWHERE).min(axis=2)
    sees = high > 0

    index = np.arange(most, dtype=np.int32)
    follows = (request[:, 1:] == request[:, :-1]) & sees[:, :-1]
    begins = sees & ~xp.pad(follows, ((0, 0), (1, 0)))
    number = xp.where(begins[:, None] & (index[None] <= index[:, None])[None], 1, 0).sum(axis=2, dtype=np.int32)
    count = number.max(axis=1)
    member = sees[:, None] & (number[:, None] == index[None, :, None] + 1)  # [programs, most segments, most]
    program = np.arange(programs, dtype=np.int32)
    later = (count > 0)[None] & (program[None] >= np.arange(programs + 1, dtype=np.int32)[:, None])
    following = xp.where(later, program[None], programs).min(axis=1)

    row = np.broadcast_to(index[None] * size, (programs, most))
    values = [request, row, row + size, low, high, free_low, free_high]
    for piece in range(plan.pieces):
        inside = row // blocks.edge_rows == piece
        values += [xp.where(inside, low, NOWHERE), xp.where(inside, high, 0)]
    signs = np.array([*SIGNS, *(1, -1) * plan.pieces], np.int32)[:, None, None]
    values = xp.stack([xp.asarray(x, np.int32) for x in values]) * signs
    fields = xp.where(member[None], values[:, :, None], NOWHERE).min(axis=3) * signs
    return _Segments(*(x.astype(np.int32) for x in (count, following, fields.reshape(len(signs), -1))))


class _Segment:
    """Fields of one segment, read where they are asked for."""

    def __init__(self, plan: _Plan, segments: _Segments, program, number):
        self._plan, self._fields = plan, segments.fields
        self._at = program * (segments.fields.shape[1] // segments.count.shape[0]) + number

    def __getattr__(self, name: str):
        return self._fields[FIELDS.index(name), self._at]

    def piece(self, number):
        """Key positions ``low, high`` of a piece of rows."""
        at = len(FIELDS) + 2 * number
        return self._fields[at, self._at], self._fields[at + 1, self._at]

    @property
    def base(self):
        """Key position where the first block begins."""
        return self.low // self._plan.unit * self._plan.unit

    def position(self, block):
        """Key position where a block begins."""
        return self.base + block * self._plan.blocks.keys

    def copies(self, block):
        """Copies of a block: as many as hold something that a row sees."""
        return jnp.minimum(pl.cdiv(self.high - self.position(block), self._plan.unit), self._plan.units)


class _Copies:
    """Copies of keys, which run ahead of what is computed: see `cursor`.

    ``cursor`` holds the program, segment, block of keys and buffer that is to be copied next, and the buffer to be
    computed next.
    """

    def __init__(self, plan: _Plan, segments: _Segments, tables, pages, buffer, semaphores, cursor, *row):
        self.plan, self.segments, self.tables, self.pages = plan, segments, tables, pages
        self.buffer, self.semaphores, self.cursor, self.row, self.row_semaphore = buffer, semaphores, cursor, *row
        self.programs = segments.count.shape[0]
        heads = plan.problem.kv_heads
        self.heads = pl.ds(pl.program_id(0) // plan.shares * heads, heads)

    def begin(self):
        """Fill all buffers but one."""
        for n in range(1, 5):
            self.cursor[n] = 0
        self.cursor[0] = self.segments.following[0]
        pl.loop(0, self.plan.buffers - 1)(lambda _: self.next())

    def next(self):
        """Start to copy the block at the cursor, if there is one, and go on to the next."""
        program, number, block, slot = (self.cursor[n] for n in range(4))

        @pl.when(program < self.programs)
        def _():
            segment = _Segment(self.plan, self.segments, program, number)
            self._start(segment, block, slot)
            ends = segment.position(block + 1) >= segment.high
            leaves = ends & (number + 1 == self.segments.count[program])
            self.cursor[0] = jnp.where(leaves, self.segments.following[program + 1], program)
            self.cursor[1] = jnp.where(leaves, 0, number + ends.astype(jnp.int32))
            self.cursor[2] = jnp.where(ends, 0, block + 1)
            self.cursor[3] = self._after(slot)

    def take(self, segment, block):
        """The buffer that holds a block, when it is all there."""
        slot = self.cursor[4]
        self.cursor[4] = self._after(slot)
        count = segment.copies(block)

        def wait(size):
            keys = self.buffer.at[slot, :, pl.ds(0, size)]
            pltpu.make_async_copy(keys, keys, self.semaphores.at[slot]).wait()

        pl.when(count == self.plan.units)(lambda: wait(self.plan.blocks.keys))
        pl.when(count != self.plan.units)(lambda: pl.loop(0, count)(lambda _: wait(self.plan.unit)))
        return slot

    def _after(self, slot):
        return jnp.where(slot == self.plan.buffers - 1, 0, slot + 1)

    def _start(self, segment, block, slot):
        plan = self.plan
        position = segment.position(block)
        if not plan.tables_in_smem:

            @pl.when(block == 0)
            def _():
                copy = pltpu.make_async_copy(self.tables.at[segment.request], self.row, self.row_semaphore)
                copy.start()
                copy.wait()

        def page_at(n):
            if plan.tables_in_smem:
                return self.tables[segment.request * plan.table_width + n]
            return self.row[0, n]

        def copy(n):
            key = position + n * plan.unit
            page, offset = page_at(key // plan.page_size), 0
            if plan.unit != plan.page_size:
                offset = pl.multiple_of(key % plan.page_size, plan.unit)
            source = self.pages.at[page, self.heads, pl.ds(offset, plan.unit)]
            target = self.buffer.at[slot, :, pl.ds(pl.multiple_of(n * plan.unit, plan.unit), plan.unit)]
            pltpu.make_async_copy(source, target, self.semaphores.at[slot]).start()

        count = segment.copies(block)

        @pl.when(count == plan.units)
        def _():
            for n in range(plan.units):
                copy(n)

        pl.when(count != plan.units)(lambda: pl.loop(0, count)(copy))


def _kernel(plan: _Plan, known, *refs):
    segments, refs = _Segments(*refs[:3]), refs[3:]
    tables, start, stop, q, pages, out, buffer, semaphores, cursor, row, row_semaphore, *scratch = refs
    problem, blocks = plan.problem, plan.blocks
    limits = None if blocks.across else scratch.pop()
    program = pl.program_id(1)
    if known is not None:
        _store(known, segments)
    copies = _Copies(plan, segments, tables, pages, buffer, semaphores, cursor, row, row_semaphore)
    values = slice(0 if buffer.shape[3] == LANES else buffer.shape[3] // 2, buffer.shape[3])

    def view(slot, only):
        """A buffer's keys and values, for rows ``only`` of the program."""

        def load(columns):
            return lambda head, keys: buffer[slot, head, keys, columns]

        k, v = load(slice(0, problem.head_dim)), load(values)
        refs = Refs(start, stop, q, k, v, out, None, *scratch, limits, only)
        return (Across if blocks.across else Down)(problem, refs)

    def clear(slot, position, segment):
        """Set to 0 the values that no row of a segment sees, in those edge blocks that hold some that are seen."""

        @pl.loop(0, blocks.keys // blocks.edge_keys)
        def _(n):
            begin, end = position + n * blocks.edge_keys, position + (n + 1) * blocks.edge_keys
            keys = pl.ds(pl.multiple_of(n * blocks.edge_keys, blocks.edge_keys), blocks.edge_keys)
            some = (begin < segment.high) & (end > segment.low)

            @pl.when(some & ((begin < segment.low) | (end > segment.high)))
            def _():
                for head in range(problem.kv_heads):
                    rows = buffer[slot, head, keys, values]
                    key = begin + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
                    seen = (key >= segment.low) & (key < segment.high)
                    buffer[slot, head, keys, values] = jnp.where(seen, rows.astype(jnp.float32), 0.0).astype(rows.dtype)

    @pl.when(program == 0)
    def _():
        maximum = scratch[0]
        maximum[...] = jnp.full_like(maximum, LOWEST)  # `finish` leaves it so, and the rest is as good as cleared
        copies.begin()

    whole = view(0, None)
    whole.prepare()
    sub_blocks = blocks.keys // blocks.edge_keys
    free_chains = [
        (pl.ds(part * blocks.rows, blocks.rows), head) for part in range(blocks.parts) for head in range(problem.heads)
    ]

    @pl.loop(0, segments.count[program])
    def _(number):
        segment = _Segment(plan, segments, program, number)
        only = segment.first, segment.last

        @pl.loop(0, pl.cdiv(segment.high - segment.base, blocks.keys))
        def _(block):
            copies.next()
            slot = copies.take(segment, block)
            position = segment.position(block)
            free = (position >= segment.free_low) & (position + blocks.keys <= segment.free_high)
            free &= segments.count[program] == 1

            @pl.when(free)
            def _():
                visit(view(slot, None), problem, position, position, blocks.keys, free_chains)

            @pl.when(~free)
            def _():
                clear(slot, position, segment)

                @pl.loop(0, plan.pieces * sub_blocks)
                def _(n):
                    piece, sub = n // sub_blocks, n % sub_blocks
                    key = position + sub * blocks.edge_keys
                    low, high = segment.piece(piece)

                    @pl.when((key < high) & (key + blocks.edge_keys > low))
                    def _():
                        rows = pl.ds(pl.multiple_of(piece * blocks.edge_rows, blocks.edge_rows), blocks.edge_rows)
                        chains = [(rows, head) for head in range(problem.heads)]
                        visit(view(slot, only), problem, position, key, blocks.edge_keys, chains, piece)

    for piece in range(plan.pieces):
        rows = pl.ds(piece * blocks.edge_rows, blocks.edge_rows)
        for head in range(problem.heads):
            whole.finish(piece, rows, head)


def _store(known: _Segments, segments: _Segments) -> None:
    """Tables into the scalar refs by the first program: for the compiler's cycle model, which reads them as zeros."""

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
        for ref, values in zip(segments, known, strict=True):
            for index in np.argwhere((values != 0) & (abs(values) < NOWHERE)):
                ref[*index.tolist()] = jnp.int32(values[*index])


def _call(plan: _Plan, q, pages, block_tables, segments: _Segments, start, stop, vmem, interpret, known):
    problem, blocks = plan.problem, plan.blocks
    lanes = problem.heads * problem.head_dim
    programs = len(start) // blocks.owned
    if blocks.across:
        split, interval = (-1, 1, blocks.edge_rows), (plan.pieces, 1, blocks.edge_rows)
        interval_spec = pl.BlockSpec(interval, lambda n, i, *_: (i, 0, 0))
    else:
        split, interval_spec = (-1, 1), pl.BlockSpec((blocks.owned, 1), lambda n, i, *_: (i, 0))
    q_spec = pl.BlockSpec((blocks.owned, lanes), lambda n, i, *_: (i, n))
    if plan.tables_in_smem:
        tables, tables_spec = block_tables.reshape(-1), pl.BlockSpec(memory_space=pltpu.SMEM)
    else:
        width = _up(plan.table_width, LANES)
        tables = jnp.pad(block_tables, ((0, 0), (0, width - plan.table_width)))[:, None]
        tables_spec = pl.BlockSpec(memory_space=pl.ANY)
    scratch = [
        pltpu.VMEM((plan.buffers, problem.kv_heads, blocks.keys, pages.shape[3]), pages.dtype),
        pltpu.SemaphoreType.DMA((plan.buffers,)),
        pltpu.SMEM((5,), jnp.int32),
        pltpu.SMEM((1, LANES if plan.tables_in_smem else tables.shape[2]), jnp.int32),
        pltpu.SemaphoreType.DMA(()),
        *scratch_shapes(problem),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan, known),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(segments),
            grid=(q.shape[1] // lanes, programs),
            in_specs=[tables_spec, interval_spec, interval_spec, q_spec, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=q_spec,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem * 6 // 5,
            disable_bounds_checks=True,  # of copies: 8% where pages hold 16 keys, and block tables are checked
        ),
        cost_estimate=costs.paged_prefill(
            jax.ShapeDtypeStruct((len(q), q.shape[1] // problem.head_dim, problem.head_dim), q.dtype),
            pages,
            len(block_tables),
            plan.table_width,
        ),
        interpret=interpret,
        name="paged_attention_prefill",
    )(
        *segments,
        tables,
        start.reshape(split),
        stop.reshape(split),
        q,
        stay_in_main_memory(pages, unless=bool(interpret) or known is not None),
    )
