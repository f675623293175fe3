"""Paged attention for NVIDIA GPUs from Ampere on, in Triton-style Pallas: a decode kernel and a prefill kernel.

Both gather keys through the block table and keep an online softmax (https://arxiv.org/abs/1805.02867) in base 2 and
float32. What a program computes is a matrix product of at least 16 rows, as tensor cores want it:

- decode, one program a (row, key head, split): the rows are the query heads that share the key head. Long contexts
  are split over programs and put together after (flash-decoding, https://pytorch.org/blog/flash-decoding/), so that
  few requests still fill a card.
- prefill, one program a (block of rows, key head): query rows and the query heads of the group are one run of
  ``T * G`` matrix rows, ``row = i // G`` and ``head = i % G``, cut into equal blocks. So a group of any size wastes
  nothing, a key is read once for all heads of the group, and blocks are full whatever the size of a tile. A block may
  hold rows of several requests: it takes one request after another, the other rows masked. A chunk of prefill has
  many blocks and two ends, so few blocks pay for this.

Pallas' Triton backend is deprecated since JAX 0.11 and there in 0.12.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels_pallas.platform import HOPPER, capability

LOWEST = -1e30
"""Score of a key that a row does not see: finite, so that a row that has seen no key yet makes no NaN."""
LOG2_E = math.log2(math.e)
NO_REQUEST = 2**31 - 1
DTYPES = ("bfloat16", "float16", "float32")

CORES = 132
"""Streaming multiprocessors to fill: an H100's; an A100 has 108 and an L4 has 58."""
PROGRAMS_PER_CORE = 2
"""Decode programs a core."""
DECODE_BYTES = 16384
"""Bytes of keys that a decode program reads in one step, with as many bytes of values."""
SPLIT_KEYS = 256
"""Keys of the longest possible context that are worth a program of their own."""
HEADS_PER_PROGRAM = 32
"""Query heads of one decode program, at most."""


class _Shape(NamedTuple):
    """What is known while a kernel is traced. Sizes are in elements."""

    rows: int  # of both kernels together, T
    decode_rows: int
    tile_rows: int
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    page_size: int
    pages_per_request: int  # M
    value_column: int  # where values begin in a slot
    block_rows: int  # rows of a program's matrix products
    block_keys: int
    scale: float
    soft_cap: float | None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


class _State(NamedTuple):
    """Running maximum and sum ``[rows]`` in base 2, and weighted values ``[rows, width]`` a part of the head."""

    maximum: jax.Array
    total: jax.Array
    values: tuple[jax.Array, ...]


class Blocks(NamedTuple):
    """Sizes of a program: matrix rows (prefill alone), keys of a step, warps, and stages of the load pipeline.

    A stage is a step of the pipeline from page number to product.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def decode_blocks(head_dim: int, dtype) -> Blocks:
    """Sizes of decode programs: keys of at most 16 KiB, and values of as many, a step.

    Timed on an H200 (heads of 128, jax 0.11.2): of 12 candidates the fastest over pages of 16, 64 and 128 together.
    Five stages in place of four took 1.08 to 1.14 times as long.
    """
    keys = DECODE_BYTES // (head_dim * jnp.dtype(dtype).itemsize)
    return Blocks(16, min(64, max(16, 1 << (keys.bit_length() - 1))), 4, 4)


def prefill_blocks(head_dim: int, dtype) -> Blocks:
    """Sizes of prefill programs: the largest that spill no register on an A100, L4 or H100.

    From Hopper on the fastest of 11 on an H200 (heads of 128, jax 0.11.2); (128, 32, 8, 3) took 1.6 times as long.
    """
    if jnp.dtype(dtype).itemsize > 2:
        # Full float32 products run on ordinary cores, with their operands in registers.
        return Blocks(16, 16, 8, 2) if head_dim > 128 else Blocks(32, 32, 8, 2)
    if (capability() or 0) >= HOPPER:
        return Blocks(64, 64, 8, 2) if head_dim > 128 else Blocks(128, 128, 8, 3)
    return Blocks(64, 32, 8, 3) if head_dim > 128 else Blocks(128, 32, 8, 3)


def num_splits(decode_rows: int, num_kv_heads: int, capacity: int, cores: int) -> int:
    """Programs that share one decode row and key head, where a request holds ``capacity`` keys at most."""
    wanted = pl.cdiv(PROGRAMS_PER_CORE * cores, decode_rows * num_kv_heads)
    return max(1, min(wanted, pl.cdiv(capacity, SPLIT_KEYS)))


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
    cores=CORES,
    for_decode=None,
    for_prefill=None,
):
    """See `kernels_pallas.paged_attention.paged_attention`.

    Args:
      cores: streaming multiprocessors of the card, which decode splits long contexts to fill.
      for_decode, for_prefill: `Blocks` in place of `decode_blocks` and `prefill_blocks`.

    Raises:
      NotImplementedError: quantised pages, q of another dtype than pages, or a page size that is no power of two of
        at least 8.
    """
    T, N, H = q.shape
    _, K, page_size, W = pages.shape
    _check(q, pages)
    tile_rows = (T - decode_rows) // max(1, len(tile_request) - decode_rows)
    shape = _Shape(
        T, decode_rows, tile_rows, N, K, H, page_size, block_tables.shape[1], W // 2, 0, 0, float(scale), soft_cap
    )
    operands = (
        q.reshape(T * N, H),
        pages.reshape(-1, W),
        block_tables.reshape(-1),
        tile_request,
        kv_start,
        kv_stop,
    )
    parts = []
    if decode_rows:
        parts.append(_decode(shape, operands, for_decode or decode_blocks(H, q.dtype), cores, interpret))
    if decode_rows < T:
        parts.append(_prefill(shape, operands, for_prefill or prefill_blocks(H, q.dtype), interpret))
    if not parts:
        return jnp.zeros_like(q)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _check(q, pages) -> None:
    page_size = pages.shape[2]
    if page_size < 8 or page_size & (page_size - 1):
        raise NotImplementedError(f"page sizes are powers of two of at least 8, got {page_size}")
    if pages.dtype.itemsize == 1:
        raise NotImplementedError(f"quantised pages are not supported yet, got {pages.dtype}: {', '.join(DTYPES)} are")
    if q.dtype != pages.dtype or q.dtype not in DTYPES:
        raise NotImplementedError(
            f"q and pages have one dtype here, of {', '.join(DTYPES)}, got {q.dtype} and {pages.dtype}"
        )


def _decode(shape: _Shape, operands, blocks: Blocks, cores: int, interpret: bool):
    """Output ``[decode_rows, N, H]`` of the first rows."""
    D, N, K, H = shape.decode_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim
    dtype = operands[0].dtype
    heads = min(max(16, pl.next_power_of_2(shape.group)), HEADS_PER_PROGRAM)
    splits = num_splits(D, K, shape.page_size * shape.pages_per_request, cores)
    shape = shape._replace(block_rows=heads, block_keys=blocks.keys)
    whole = jax.ShapeDtypeStruct((D * N, H), dtype)
    parts = [
        jax.ShapeDtypeStruct((splits * D * N, H), jnp.float32),
        jax.ShapeDtypeStruct((splits * D * N,), jnp.float32),
        jax.ShapeDtypeStruct((splits * D * N,), jnp.float32),
    ]
    out = pl.pallas_call(
        lambda *refs: _decode_kernel(shape, splits, *refs),
        out_shape=[whole] if splits == 1 else parts,
        grid=(D, K * pl.cdiv(shape.group, heads), splits),
        compiler_params=triton.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name="paged_attention_decode",
    )(*operands)
    if splits == 1:
        return out[0].reshape(D, N, H)
    values, maximum, total = (x.reshape(splits, D, N, *x.shape[1:]) for x in out)
    weights = jnp.exp2(maximum - maximum.max(axis=0, keepdims=True))
    total = (weights * total).sum(axis=0)
    values = (weights[..., None] * values).sum(axis=0)
    return _divide(values, total).astype(dtype)


def _prefill(shape: _Shape, operands, blocks: Blocks, interpret: bool):
    """Output ``[T - decode_rows, N, H]`` of the rows after the decode rows."""
    rows, N, H = shape.rows - shape.decode_rows, shape.num_heads, shape.head_dim
    dtype = operands[0].dtype
    shape = shape._replace(block_rows=blocks.rows, block_keys=blocks.keys)
    out = pl.pallas_call(
        lambda *refs: _prefill_kernel(shape, *refs),
        out_shape=jax.ShapeDtypeStruct((rows * N, H), dtype),
        grid=(pl.cdiv(rows * shape.group, blocks.rows), shape.num_kv_heads),
        compiler_params=triton.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name="paged_attention_prefill",
    )(*operands)
    return out.reshape(rows, N, H)


def _decode_kernel(shape: _Shape, splits, q_ref, pages_ref, tables_ref, tiles_ref, start_ref, stop_ref, *out_refs):
    """One decode row, the query heads of one key head, one part of the keys that the row sees."""
    heads = shape.block_rows
    programs_per_group = pl.cdiv(shape.group, heads)
    row, split = pl.program_id(0), pl.program_id(2)
    kv_head = lax.div(pl.program_id(1), programs_per_group)
    head = lax.rem(pl.program_id(1), programs_per_group) * heads + _iota(heads)
    own = head < shape.group
    q_rows = row * shape.num_heads + kv_head * shape.group + head
    q = _load_parts(q_ref, q_rows, 0, shape.head_dim, own)

    request, start, stop = tiles_ref[row], start_ref[row], stop_ref[row]
    first = lax.div(start, shape.block_keys)
    last = jnp.where(stop > start, _cdiv(stop, shape.block_keys), first)
    share = _cdiv(last - first, splits)
    begin = first + split * share

    # Every block is masked: the loop waits for memory, and leaving it for another loop would drain its loads.
    def key_block(j, state):
        keys = j * shape.block_keys + _iota(shape.block_keys)
        seen = (start <= keys) & (keys < stop)
        slots = _slots(shape, tables_ref, request, kv_head, j)
        return _update(shape, state, q, pages_ref, slots, seen, seen[None])

    state = lax.fori_loop(begin, jnp.minimum(begin + share, last), key_block, _init(shape))
    if splits == 1:
        values = tuple(_divide(x, state.total) for x in state.values)
        _store_parts(out_refs[0], q_rows, shape.head_dim, own, values)
        return
    values_ref, maximum_ref, total_ref = out_refs
    out_rows = split * (shape.decode_rows * shape.num_heads) + q_rows
    _store_parts(values_ref, out_rows, shape.head_dim, own, state.values)
    triton.store(maximum_ref.at[out_rows], state.maximum, mask=own)
    triton.store(total_ref.at[out_rows], state.total, mask=own)


def _prefill_kernel(shape: _Shape, q_ref, pages_ref, tables_ref, tiles_ref, start_ref, stop_ref, out_ref):
    """One block of matrix rows and the keys that they see, one request after another."""
    # A chunk's last rows see the most keys: they start first, so that no long program is left at the end.
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    kv_head = pl.program_id(1)
    index = block * shape.block_rows + _iota(shape.block_rows)
    prefill_row = lax.div(index, shape.group)
    inside = prefill_row < shape.rows - shape.decode_rows
    row = shape.decode_rows + prefill_row
    out_rows = _out_rows(shape, kv_head, index)
    start = triton.load(start_ref.at[row], mask=inside, other=0)
    stop = triton.load(stop_ref.at[row], mask=inside, other=0)
    occupied = stop > start
    tile = shape.decode_rows + lax.div(prefill_row, shape.tile_rows)
    request = triton.load(tiles_ref.at[tile], mask=occupied, other=NO_REQUEST)
    q = _load_parts(q_ref, shape.decode_rows * shape.num_heads + out_rows, 0, shape.head_dim, occupied)

    empty = tuple(jnp.zeros((shape.block_rows, width), jnp.float32) for _, width in _parts(shape.head_dim))
    _store_parts(out_ref, out_rows, shape.head_dim, inside & ~occupied, empty)

    def one_run(carry):
        current, request = carry
        own, low, high = _run(request == current, start, stop)
        values = _attend(shape, q, pages_ref, tables_ref, current, kv_head, start, stop, own, low, high)
        # Made again from a number that the compiler can't know to be 0, so that no register holds it all the while.
        again = _out_rows(shape, kv_head, index + jnp.minimum(current, 0))
        _store_parts(out_ref, again, shape.head_dim, own, values)
        request = jnp.where(own, NO_REQUEST, request)
        return jnp.min(request), request

    lax.while_loop(lambda carry: carry[0] < NO_REQUEST, one_run, (jnp.min(request), request))


def _out_rows(shape: _Shape, kv_head, index):
    """Rows of the flat output ``[T * N, H]`` of a key head's matrix rows."""
    return lax.div(index, shape.group) * shape.num_heads + kv_head * shape.group + lax.rem(index, shape.group)


def _run(rows, start, stop):
    """Those of ``rows`` whose intervals make one run of keys with no gap, from the lowest start on: (own, low, high).

    With gaps out of the way, a key in ``[low, high)`` is seen by some row, so nothing else need be cleared of NaN.
    The run ends at the first stop that is in (or at the start of) no other row's interval:

        intervals [0, 3) [7, 9) [2, 5)     first run: rows 0 and 2, keys [0, 5)     second run: row 1, keys [7, 9)
    """
    start, stop = jnp.where(rows, start, NO_REQUEST), jnp.where(rows, stop, 0)
    # No loop that grows a run: a `while` before a `for` keeps the compiler from pipelining the latter.
    goes_on = (start[None] <= stop[:, None]) & (stop[:, None] < stop[None])
    ends = rows & (jnp.max(goes_on.astype(jnp.int32), axis=1) == 0)
    high = jnp.min(jnp.where(ends, stop, NO_REQUEST))
    return rows & (start < high), jnp.min(start), high


def _attend(shape: _Shape, q, pages_ref, tables_ref, request, kv_head, start, stop, own, low, high):
    """Output of the rows ``own``, all of one request, who see the keys ``[low, high)`` and no gap between.

    What it gives for other rows means nothing.
    """
    size = shape.block_keys
    first, last = lax.div(low, size), _cdiv(high, size)
    # Blocks in [inner, outer) are seen by all of the rows and need no mask: the others are edges.
    inner = jnp.minimum(_cdiv(jnp.max(jnp.where(own, start, 0)), size), last)
    outer = jnp.maximum(lax.div(jnp.min(jnp.where(own, stop, NO_REQUEST)), size), inner)

    def whole_block(j, state):
        return _update(shape, state, q, pages_ref, _slots(shape, tables_ref, request, kv_head, j), None, None)

    def edge_block(i, state):
        j = i + jnp.where(i < inner, 0, outer - inner)
        keys = j * size + _iota(size)
        used = (low <= keys) & (keys < high)
        seen = (start[:, None] <= keys[None]) & (keys[None] < stop[:, None])
        return _update(shape, state, q, pages_ref, _slots(shape, tables_ref, request, kv_head, j), used, seen)

    state = lax.fori_loop(inner, outer, whole_block, _init(shape))
    # Edges before and after the inner blocks in one loop, since each loop fills and drains the load pipeline.
    state = lax.fori_loop(first, last - (outer - inner), edge_block, state)
    return tuple(_divide(x, state.total) for x in state.values)


def _init(shape: _Shape) -> _State:
    return _State(
        jnp.full((shape.block_rows,), LOWEST, jnp.float32),
        jnp.zeros((shape.block_rows,), jnp.float32),
        tuple(jnp.zeros((shape.block_rows, width), jnp.float32) for _, width in _parts(shape.head_dim)),
    )


def _update(shape: _Shape, state: _State, q, pages_ref, slots, used, seen) -> _State:
    """Take in the keys and values of ``slots``.

    Keys that are not ``used [keys]`` are not read, since 0 * NaN is NaN; ``seen [rows, keys]`` is each row's mask.
    Without them all rows see all keys. What a row gathers before it sees a key counts for nothing: its decay is
    ``exp2(LOWEST - maximum) = 0`` when it does.
    """
    k = _load_parts(pages_ref, slots, 0, shape.head_dim, used)
    v = _load_parts(pages_ref, slots, shape.value_column, shape.head_dim, used)
    first, *others = (_dot(x, y, trans_b=True) for x, y in zip(q, k, strict=True))
    scores = sum(others, first)
    if shape.soft_cap is None:
        scores *= shape.scale * LOG2_E
    else:
        scores = jnp.tanh(scores * (shape.scale / shape.soft_cap)) * (shape.soft_cap * LOG2_E)
    if seen is not None:
        scores = jnp.where(seen, scores, LOWEST)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=1))
    decay = jnp.exp2(state.maximum - maximum)
    weights = jnp.exp2(scores - maximum[:, None])
    total = state.total * decay + jnp.sum(weights, axis=1)
    weights = weights.astype(pages_ref.dtype)
    values = tuple(x * decay[:, None] + _dot(weights, y) for x, y in zip(state.values, v, strict=True))
    return _State(maximum, total, values)


def _slots(shape: _Shape, tables_ref, request, kv_head, j):
    """Rows of the flat pages ``[P * K * page_size, W]`` that hold one head's keys of block ``j``."""
    size, page_size = shape.block_keys, shape.page_size
    log2, within = page_size.bit_length() - 1, page_size - 1
    table = request * shape.pages_per_request
    if page_size >= size:
        page = tables_ref[table + ((j * size) >> log2)]
        return (page * shape.num_kv_heads + kv_head) * page_size + ((j * size) & within) + _iota(size)
    keys = j * size + _iota(size)
    # The last block may reach past the table's end.
    page = triton.load(tables_ref.at[table + jnp.minimum(keys >> log2, shape.pages_per_request - 1)])
    return (page * shape.num_kv_heads + kv_head) * page_size + (keys & within)


def _parts(head_dim: int) -> list[tuple[int, int]]:
    """Columns of a head as (first, width), each a power of two of at least 16, as few padded as can be.

    80 is 64 and 16; 72 is 64 and 16, half of it padding; a width of 128 would waste 48 and 56.
    """
    parts, first = [], 0
    while first < head_dim:
        left = head_dim - first
        width = 16 if left < 16 else 1 << (left.bit_length() - 1)
        parts.append((first, width))
        first += width
    return parts


def _load_parts(ref, rows, column: int, head_dim: int, row_mask):
    """Rows of ``ref`` ``[.., columns]`` from ``column`` on, in the parts of a head; zeros where masked."""
    parts = []
    for first, width in _parts(head_dim):
        columns = first + _iota(width)
        mask = None if row_mask is None else row_mask[:, None]
        if first + width > head_dim:
            mask = columns[None] < head_dim if mask is None else mask & (columns[None] < head_dim)
        at = ref.at[rows[:, None], column + columns[None]]
        parts.append(triton.load(at) if mask is None else triton.load(at, mask=mask, other=0))
    return tuple(parts)


def _store_parts(ref, rows, head_dim: int, row_mask, parts) -> None:
    for (first, width), part in zip(_parts(head_dim), parts, strict=True):
        columns = first + _iota(width)
        mask = row_mask[:, None] & (columns[None] < head_dim)
        triton.store(ref.at[rows[:, None], columns[None]], part.astype(ref.dtype), mask=mask)


def _dot(a, b, *, trans_b: bool = False):
    return triton.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _divide(values, total):
    """``values / total``, zeros where no key was seen."""
    empty = total == 0
    return jnp.where(empty[..., None], 0, values / jnp.where(empty, 1, total)[..., None])


def _iota(size: int):
    return lax.iota(jnp.int32, size)


def _cdiv(x, y: int):
    """``x / y`` rounded up; ``x`` is no negative number."""
    return lax.div(x + (y - 1), y)
