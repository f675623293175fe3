"""Dense attention for NVIDIA GPUs: Triton-style Pallas, one source for Ampere, Ada and Hopper.

One program makes a block of query rows of one head; it walks the blocks of keys between the bounds of its rows'
intervals and masks only those at an edge:

    keys      0 .. first | first .. free | free .. free_stop | free_stop .. last | last .. S
    blocks    not read   | masked        | as they are       | masked            | not read

The backward pass makes the weights again from the rows' log-sums, queries by blocks of rows and keys and values by
blocks of keys (FlashAttention-2, https://arxiv.org/abs/2307.08691): no atomic addition, hence the same bits each time.

Pallas' Triton lowering is deprecated since jax 0.11 (0.12 gives a DeprecationWarning as it lowers). What is Triton's
own stands in `_load`, `_store` and `_params`; the rest is plain jax.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels_pallas.platform import HOPPER, capability

__all__ = ["BLOCKS", "BLOCKS_HOPPER", "Blocks", "backward", "forward"]

LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Query rows and keys of a tile, warps of a program, and stages of the loads' pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


class KernelBlocks(NamedTuple):
    """Blocks of the forward kernel, and of the two backward kernels."""

    forward: Blocks
    d_query: Blocks
    d_key: Blocks


BLOCKS = {
    (64, 2): KernelBlocks(Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (128, 2): KernelBlocks(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (256, 2): KernelBlocks(Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    (64, 4): KernelBlocks(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    (128, 4): KernelBlocks(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    (256, 4): KernelBlocks(Blocks(32, 32, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
"""By the largest head dimension and the bytes of a number: what serves every card from A100 on.

Made by compiling candidates for A100, L4 and H100 (`kernels_pallas.compile_only.gpu`, jax 0.10.2, ptxas 12.9), with
and without a soft cap, and keeping the largest that fits the smallest shared memory (L4's) and, in the forward pass,
spills no register on any. Tried and dropped for spills on A100: (128, 64, 4, 3) at 64 with ragged lengths,
(128, 64, 4, 2) at 72, (128, 32, 4, 2) at 128, (64, 32, 4, 2) and (128, 32, 8, 2) at 256; for L4's memory:
(64, 64, 8, 2) at 256. Not timed on these cards.
"""

BLOCKS_HOPPER = BLOCKS | {
    (64, 2): KernelBlocks(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    (96, 2): KernelBlocks(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (128, 2): KernelBlocks(Blocks(128, 128, 8, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (256, 2): KernelBlocks(Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 1), Blocks(64, 32, 8, 2)),
}
"""The same from Hopper on: the fastest of 5 to 12 candidates each, timed on an H200 with jax 0.11.2.

What counts is 64 rows for each four warps, a warp group's product: 64 rows with eight warps took 1.9 to 2.2 times as
long. Forward at 128: (64, 64, 4, 3) took 1.10 times as long, (128, 64, 8, 3) 1.04, (128, 64, 8, 2) 1.20. By query at
256 the fastest spills 1.3 kB; what spills nothing, (64, 32, 8, 2), took 1.7 times as long.
"""


class _Problem(NamedTuple):
    """Static facts of a call: lengths, head dimension, its tiles ``(offset, width)``, block sizes, and the scores."""

    num_rows: int
    num_keys: int
    head_dim: int
    tiles: tuple[tuple[int, int], ...]
    blocks: Blocks
    scale: float
    soft_cap: float | None

    @property
    def width(self) -> int:
        """The head dimension as tiles cover it."""
        return sum(width for _, width in self.tiles)


def forward(q, k, v, kv_start, kv_stop, *, scale, soft_cap, interpret, with_lse=True, blocks=None):
    """Attention's output ``[B, T, N, H]`` and the rows' log-sums ``[B, T, N]``, float32.

    Args:
      q: ``[B, T, N, H]``. k, v: ``[B, S, K, H]``, of the same dtype: bfloat16, float16 or float32.
      kv_start, kv_stop: int32 ``[B, T]``; a row with ``kv_stop <= kv_start`` gives zeros and a log-sum of -inf.
      scale: factor on the scores. soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)`` before masking.
      interpret: run the kernel as plain jax, for tests.
      with_lse: whether to give log-sums; None in their place otherwise.
      blocks: `Blocks` in place of the table's.

    Raises:
      NotImplementedError: a dtype or head dimension that the kernel can't do.
    """
    problem = _problem(q, k, v, scale, soft_cap, "forward", blocks)
    B, T, N, _ = q.shape
    num_blocks = pl.cdiv(T, problem.blocks.rows)

    # The last rows of a causal mask see the most keys: they start first, and short ones fill the gaps at the end.
    def place(n, i, b):
        return b, num_blocks - 1 - i, n

    head, row, interval = (make(problem, place) for make in (_head_rows, _row_values, _intervals))
    whole = _whole_keys(problem, N // k.shape[2])
    out, lse = pl.pallas_call(
        partial(_forward_kernel, problem),
        grid=(N, num_blocks, B),
        in_specs=[head, whole, whole, interval, interval, _used_spec(problem)],
        out_specs=[head, row],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)],
        compiler_params=_params(problem.blocks),
        interpret=interpret,
        name="interval_attention_forward",
    )(q, k, v, kv_start, kv_stop, _used_keys(kv_start, kv_stop, problem.num_keys))
    return out, lse if with_lse else None


def backward(q, k, v, kv_start, kv_stop, lse, delta, d_out, *, scale, soft_cap, interpret, d_query=None, d_key=None):
    """Gradients by q, k and v, in their dtypes.

    Args:
      q, k, v, kv_start, kv_stop, scale, soft_cap, interpret: as for `forward`.
      lse: log-sums of `forward`, float32 ``[B, T, N]``.
      delta: ``sum_h(d_out * out) - d_lse``, float32 ``[B, T, N]``.
      d_out: gradient by the output, ``[B, T, N, H]`` of q's dtype.
      d_query, d_key: `Blocks` of the two kernels in place of the table's.

    Raises:
      NotImplementedError: a dtype or head dimension that the kernels can't do.
    """
    operands = (q, k, v, kv_start, kv_stop, lse, delta, d_out)
    by_query = _d_query(_problem(q, k, v, scale, soft_cap, "d_query", d_query), operands, interpret)
    return by_query, *_d_key(_problem(q, k, v, scale, soft_cap, "d_key", d_key), operands, interpret)


def _problem(q, k, v, scale, soft_cap, kernel: str, blocks: Blocks | None) -> _Problem:
    H = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            "pallas_gpu takes q, k and v of one dtype, bfloat16, float16 or float32; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not 8 <= H <= 256:
        raise NotImplementedError(f"pallas_gpu takes head dimensions of 8 to 256, got {H}")
    if blocks is None:
        table = BLOCKS_HOPPER if (capability() or 0) >= HOPPER else BLOCKS
        width = next(width for width, size in sorted(table) if width >= H and size == q.dtype.itemsize)
        blocks = getattr(table[width, q.dtype.itemsize], kernel)
        T, S = q.shape[1], k.shape[1]
        blocks = blocks._replace(rows=min(blocks.rows, _power_of_2(T)), keys=min(blocks.keys, _power_of_2(S)))
    return _Problem(q.shape[1], k.shape[1], H, _tiles(H), blocks, scale, soft_cap)


def _power_of_2(size: int) -> int:
    """The next power of 2, and at least 16, which the matrix units want."""
    return max(16, pl.next_power_of_2(size))


def _tiles(head_dim: int) -> tuple[tuple[int, int], ...]:
    """Powers of 2 that cover the head dimension, two at most: 72 and 80 are 64 + 16, 96 is 64 + 32, 112 is 128."""
    most = _power_of_2(head_dim)
    first = most // 2
    rest = _power_of_2(max(head_dim - first, 1))
    return ((0, most),) if most == 16 or first + rest == most else ((0, first), (first, rest))


# ----- Triton's own words


def _params(blocks: Blocks):
    return triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


def _load(ref, at, size: int, problem: _Problem, inside=None, *, head=()):
    """Rows ``at ..`` of a head as one tile ``[size, width]`` per part of the head dimension; zeros past the edges.

    ``inside`` tells which rows to read; None: all. ``head``: ``(index,)`` where the reference holds many.
    """

    def tile(offset, width):
        columns = offset + _range(width) < problem.head_dim if offset + width > problem.head_dim else None
        mask = _outer(inside, columns, size, width)
        other = None if mask is None else jnp.zeros((), ref.dtype)
        return triton.load(ref.at[(pl.ds(at, size), *head, pl.ds(offset, width))], mask=mask, other=other)

    return tuple(tile(*part) for part in problem.tiles)


def _store(ref, tiles, size: int, problem: _Problem, inside) -> None:
    for (offset, width), tile in zip(problem.tiles, tiles, strict=True):
        columns = offset + _range(width) < problem.head_dim if offset + width > problem.head_dim else None
        mask = _outer(inside, columns, size, width)
        triton.store(ref.at[pl.ds(0, size), pl.ds(offset, width)], tile.astype(ref.dtype), mask=mask)


def _load_rows(ref, at, size: int, inside=None, *, head=()):
    """One number a row, 0 where there is no row."""
    other = None if inside is None else jnp.zeros((), ref.dtype)
    return triton.load(ref.at[(pl.ds(at, size), *head)], mask=inside, other=other)


def _store_rows(ref, values, size: int, inside) -> None:
    triton.store(ref.at[pl.ds(0, size)], values, mask=inside)


# ----- shared by the kernels


def _range(size: int):
    return jnp.arange(size, dtype=jnp.int32)


def _outer(rows, columns, num_rows: int, num_columns: int):
    """``rows`` and ``columns`` as one mask; None stands for all."""
    if rows is None and columns is None:
        return None
    shape = (num_rows, num_columns)
    rows = None if rows is None else jnp.broadcast_to(rows[:, None], shape)
    columns = None if columns is None else jnp.broadcast_to(columns[None, :], shape)
    return columns if rows is None else rows if columns is None else rows & columns


def _dot(a, b, contract=(1, 0)):
    """Product over axis ``contract[0]`` of a and ``contract[1]`` of b, accumulated in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _rows_by_rows(a, b):
    """``a @ b.T``, each given as tiles of the head dimension."""
    total = _dot(a[0], b[0], (1, 1))
    for left, right in zip(a[1:], b[1:], strict=True):
        total = total + _dot(left, right, (1, 1))
    return total


def _scores(product, problem: _Problem):
    """Scores in a unit of their own, and what makes them exponents of 2 (a positive number).

    The factor is applied with the row's maximum, in one multiply-add.
    """
    if problem.soft_cap is not None:
        return jnp.tanh(product * jnp.float32(problem.scale / problem.soft_cap)), problem.soft_cap * LOG2_E
    if problem.scale <= 0:
        return product * jnp.float32(problem.scale), LOG2_E
    return product, problem.scale * LOG2_E


def _read_intervals(start_ref, stop_ref, at, size: int, inside, num_keys: int):
    """The rows' intervals within ``[0, num_keys]``; a row that is not there sees nothing."""
    start = jnp.maximum(_load_rows(start_ref, at, size, inside), 0)
    return start, jnp.minimum(_load_rows(stop_ref, at, size, inside), num_keys)


def _key_bounds(start, stop, block: int, num_keys: int):
    """Blocks of keys ``(first, free, free_stop, last)`` of a block of rows; see the module's text.

    Empty rows do not count: what they gather is dropped. Rows [0, 5) and [0, 9) in blocks of 4: 0, 0, 1, 3.
    """
    occupied = stop > start
    low, high = jnp.min(jnp.where(occupied, start, num_keys)), jnp.max(jnp.where(occupied, stop, 0))
    free, free_stop = jnp.max(jnp.where(occupied, start, 0)), jnp.min(jnp.where(occupied, stop, num_keys))
    first = lax.div(low, jnp.int32(block))
    last = jnp.maximum(first, lax.div(high + (block - 1), jnp.int32(block)))
    free = jnp.clip(lax.div(free + (block - 1), jnp.int32(block)), first, last)
    return first, free, jnp.clip(lax.div(free_stop, jnp.int32(block)), free, last), last


def _walk(bounds, body, carry):
    """``body(masked, index, carry)`` over blocks: those that need no mask, then both edges in one loop.

    The order of keys is free, and two loops need less code and fewer registers than three. Bounds 2, 4, 7, 8 give
    4, 5, 6 and then 2, 3, 7.
    """
    first, free, free_stop, last = bounds
    carry = lax.fori_loop(free, free_stop, partial(body, False), carry)
    ahead = free - first

    def edge(i, carry):
        return body(True, jnp.where(i < ahead, first + i, free_stop - ahead + i), carry)

    return lax.fori_loop(jnp.int32(0), ahead + last - free_stop, edge, carry)


def _seen(start, stop, used_ref, at, size: int, num_keys: int):
    """Which keys of a block each row sees, and which any row of the batch row sees: no other is read."""
    keys_at = at + _range(size)
    seen = (start[:, None] <= keys_at[None, :]) & (keys_at[None, :] < stop[:, None])
    return seen, _load_rows(used_ref, at, size, keys_at < num_keys) > 0


def _used_keys(kv_start, kv_stop, num_keys: int):
    """1 for a key that any row sees, else 0, int32 ``[B, S]``.

    Others may hold NaN, and 0 * NaN is NaN. To find them in the kernels that need this costs them 50 to 100 registers.
    Intervals that begin less those that have ended: rows [0, 2) and [1, 4) of 5 keys count 1 2 1 1 0.
    """
    occupied = kv_stop > kv_start
    start, stop = (jnp.where(occupied, jnp.clip(x, 0, num_keys), num_keys) for x in (kv_start, kv_stop))
    batch = _range(kv_start.shape[0])[:, None]
    change = jnp.zeros((kv_start.shape[0], num_keys + 1), jnp.int32).at[batch, start].add(1).at[batch, stop].add(-1)
    return (jnp.cumsum(change, axis=1)[:, :num_keys] > 0).astype(jnp.int32)


def _head_rows(problem: _Problem, place):
    """A block of rows of one head, of ``[B, T, N, H]``."""

    def index(*ids):
        b, i, n = place(*ids)
        return b, i, n, 0

    return pl.BlockSpec((None, problem.blocks.rows, None, problem.width), index)


def _row_values(problem: _Problem, place):
    """A block of rows of one head, of ``[B, T, N]``."""
    return pl.BlockSpec((None, problem.blocks.rows, None), place)


def _intervals(problem: _Problem, place):
    """A block of rows of ``[B, T]``."""
    return pl.BlockSpec((None, problem.blocks.rows), lambda *ids: place(*ids)[:2])


def _whole_keys(problem: _Problem, group: int):
    """All keys of a query head's key head, for a grid of ``(N, blocks, B)``."""
    return pl.BlockSpec(
        (None, problem.num_keys, None, problem.width), lambda n, i, b: (b, 0, lax.div(n, jnp.int32(group)), 0)
    )


def _used_spec(problem: _Problem):
    """The numbers of `_used_keys`, for a grid of ``(N, blocks, B)``."""
    return pl.BlockSpec((None, problem.num_keys), lambda n, i, b: (b, 0))


# ----- forward


def _forward_kernel(problem, q_ref, k_ref, v_ref, start_ref, stop_ref, used_ref, out_ref, lse_ref):
    rows, keys = problem.blocks.rows, problem.blocks.keys
    block = pl.num_programs(1) - 1 - pl.program_id(1)
    inside = block * rows + _range(rows) < problem.num_rows
    start, stop = _read_intervals(start_ref, stop_ref, 0, rows, inside, problem.num_keys)
    q = _load(q_ref, 0, rows, problem, inside)

    def body(masked, j, carry):
        maximum, total, values = carry
        seen, used = _seen(start, stop, used_ref, j * keys, keys, problem.num_keys) if masked else (None, None)
        product = _rows_by_rows(q, _load(k_ref, j * keys, keys, problem, used))
        scores, factor = _scores(product, problem)
        if masked:
            scores = jnp.where(seen, scores, -jnp.inf)
        highest = jnp.maximum(maximum, jnp.max(scores, axis=1))
        # A row that has seen no key yet: -inf less -inf is NaN.
        base = jnp.where(highest == -jnp.inf, 0.0, highest) if masked else highest
        weights = jnp.exp2(scores * factor - (base * factor)[:, None])
        decay = jnp.exp2((maximum - base) * factor)
        v = _load(v_ref, j * keys, keys, problem, used)
        values = tuple(x * decay[:, None] + _dot(weights.astype(y.dtype), y) for x, y in zip(values, v, strict=True))
        return highest, total * decay + jnp.sum(weights, axis=1), values

    zeros = tuple(jnp.zeros((rows, width), jnp.float32) for _, width in problem.tiles)
    carry = jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros((rows,), jnp.float32), zeros
    bounds = _key_bounds(start, stop, keys, problem.num_keys)
    maximum, total, values = _walk(bounds, body, carry)
    occupied = stop > start
    share = jnp.where(occupied, 1 / jnp.where(occupied, total, 1.0), 0.0)
    # What an empty row gathered may be NaN, which a factor of 0 does not clear.
    values = tuple(jnp.where(occupied[:, None], x * share[:, None], 0.0) for x in values)
    _store(out_ref, values, rows, problem, inside)
    exponent = _scores(jnp.float32(0), problem)[1] / LOG2_E
    lse = jnp.where(occupied, maximum * exponent + jnp.log(jnp.where(occupied, total, 1.0)), -jnp.inf)
    _store_rows(lse_ref, lse, rows, inside)


# ----- backward


def _d_query(problem, operands, interpret):
    q, k = operands[:2]
    (B, T, N, _), rows = q.shape, problem.blocks.rows
    num_blocks = pl.cdiv(T, rows)

    def place(n, i, b):
        return b, num_blocks - 1 - i, n

    head, row, interval = (make(problem, place) for make in (_head_rows, _row_values, _intervals))
    whole = _whole_keys(problem, N // k.shape[2])
    return pl.pallas_call(
        partial(_d_query_kernel, problem),
        grid=(N, num_blocks, B),
        in_specs=[head, whole, whole, interval, interval, row, row, head, _used_spec(problem)],
        out_specs=head,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_params(problem.blocks),
        interpret=interpret,
        name="interval_attention_d_query",
    )(*operands, _used_keys(*operands[3:5], problem.num_keys))


def _d_query_kernel(problem, q_ref, k_ref, v_ref, start_ref, stop_ref, lse_ref, delta_ref, d_out_ref, used_ref, dq_ref):
    rows, keys = problem.blocks.rows, problem.blocks.keys
    block = pl.num_programs(1) - 1 - pl.program_id(1)
    inside = block * rows + _range(rows) < problem.num_rows
    start, stop = _read_intervals(start_ref, stop_ref, 0, rows, inside, problem.num_keys)
    occupied = stop > start
    q = _load(q_ref, 0, rows, problem, inside)
    d_out = _load(d_out_ref, 0, rows, problem, inside)
    lse = _load_rows(lse_ref, 0, rows, inside) * LOG2_E
    delta = _load_rows(delta_ref, 0, rows, inside)

    def body(masked, j, dq):
        seen, used = _seen(start, stop, used_ref, j * keys, keys, problem.num_keys) if masked else (None, None)
        k = _load(k_ref, j * keys, keys, problem, used)
        scores, factor = _scores(_rows_by_rows(q, k), problem)
        weights = jnp.exp2(scores * factor - lse[:, None])
        v = _load(v_ref, j * keys, keys, problem, used)
        d_scores = weights * (_rows_by_rows(d_out, v) - delta[:, None])
        if problem.soft_cap is not None:
            d_scores = d_scores * (1 - scores * scores)
        if masked:
            d_scores = jnp.where(seen, d_scores, 0.0)
        return tuple(x + _dot(d_scores.astype(y.dtype), y) for x, y in zip(dq, k, strict=True))

    dq = tuple(jnp.zeros((rows, width), jnp.float32) for _, width in problem.tiles)
    dq = _walk(_key_bounds(start, stop, keys, problem.num_keys), body, dq)
    dq = tuple(jnp.where(occupied[:, None], x * jnp.float32(problem.scale), 0.0) for x in dq)
    _store(dq_ref, dq, rows, problem, inside)


def _d_key(problem, operands, interpret):
    q, k, v, kv_start, kv_stop = operands[:5]
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    bounds = _row_bounds(kv_start, kv_stop, problem)
    queries = pl.BlockSpec((None, T, N // K, problem.width), lambda j, h, b: (b, 0, h, 0))
    row = pl.BlockSpec((None, T, N // K), lambda j, h, b: (b, 0, h))
    interval = pl.BlockSpec((None, T), lambda j, h, b: (b, 0))
    head = pl.BlockSpec((None, problem.blocks.keys, None, problem.width), lambda j, h, b: (b, j, h, 0))
    bound = pl.BlockSpec((None, *bounds.shape[1:]), lambda j, h, b: (b, 0, 0))
    return pl.pallas_call(
        partial(_d_key_kernel, problem, N // K),
        grid=(pl.cdiv(S, problem.blocks.keys), K, B),
        in_specs=[queries, head, head, interval, interval, row, row, queries, bound],
        out_specs=[head, head],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_params(problem.blocks),
        interpret=interpret,
        name="interval_attention_d_key",
    )(*operands, bounds)


def _row_bounds(kv_start, kv_stop, problem: _Problem):
    """Blocks of rows ``[first, free, free_stop, last]`` that see each block of keys, int32 ``[B, blocks of keys, 4]``.

    Of the blocks of rows in ``[first, last)`` those in ``[free, free_stop)``, the first run of such, see all of these
    keys with all of their rows. Each of the small reductions below is fused with its comparison: no array of blocks
    by blocks is made.
    """
    rows, keys, S = problem.blocks.rows, problem.blocks.keys, problem.num_keys
    num = pl.cdiv(problem.num_rows, rows)
    padding = [(0, 0), (0, num * rows - problem.num_rows)]
    start, stop = (jnp.pad(x, padding).reshape(-1, num, rows) for x in (kv_start, kv_stop))
    start, stop = jnp.maximum(start, 0), jnp.minimum(stop, S)
    occupied = stop > start
    low = jnp.min(jnp.where(occupied, start, S), axis=2)[:, :, None]
    high = jnp.max(jnp.where(occupied, stop, 0), axis=2)[:, :, None]
    full_low, full_high = jnp.max(start, axis=2)[:, :, None], jnp.min(stop, axis=2)[:, :, None]
    full_high = jnp.where(occupied.all(axis=2)[:, :, None], full_high, 0)
    key = (_range(pl.cdiv(S, keys)) * keys)[None, None, :]
    row = _range(num)[None, :, None]
    seen = (low < key + keys) & (key < high)
    whole = (full_low <= key) & (key + keys <= full_high)
    last = jnp.max(jnp.where(seen, row + 1, 0), axis=1)
    first = jnp.minimum(jnp.min(jnp.where(seen, row, num), axis=1), last)
    free = jnp.min(jnp.where(whole, row, last[:, None]), axis=1)
    free_stop = jnp.min(jnp.where(~whole & (row > free[:, None]), row, last[:, None]), axis=1)
    return jnp.stack([first, free, jnp.maximum(free, free_stop), last], axis=2)


def _d_key_kernel(
    problem, group, q_ref, k_ref, v_ref, start_ref, stop_ref, lse_ref, delta_ref, d_out_ref, bounds_ref, dk_ref, dv_ref
):
    rows, keys = problem.blocks.rows, problem.blocks.keys
    block = pl.program_id(0)
    keys_at = block * keys + _range(keys)
    there = keys_at < problem.num_keys
    k, v = _load(k_ref, 0, keys, problem, there), _load(v_ref, 0, keys, problem, there)
    bounds = tuple(bounds_ref[block, i] for i in range(4))

    def row_block(head, masked, i, carry):
        dk, dv = carry
        inside = occupied = None
        if masked:
            inside = i * rows + _range(rows) < problem.num_rows
            start, stop = _read_intervals(start_ref, stop_ref, i * rows, rows, inside, problem.num_keys)
            # An empty row may hold NaN: it is not even read.
            occupied = stop > start
        q = _load(q_ref, i * rows, rows, problem, occupied, head=(head,))
        d_out = _load(d_out_ref, i * rows, rows, problem, occupied, head=(head,))
        lse = _load_rows(lse_ref, i * rows, rows, occupied, head=(head,)) * LOG2_E
        delta = _load_rows(delta_ref, i * rows, rows, occupied, head=(head,))
        scores, factor = _scores(_rows_by_rows(k, q), problem)  # keys by rows
        weights = jnp.exp2(scores * factor - lse[None, :])
        if masked:
            seen = (start[None, :] <= keys_at[:, None]) & (keys_at[:, None] < stop[None, :])
            weights = jnp.where(seen, weights, 0.0)
        dv = tuple(x + _dot(weights.astype(y.dtype), y) for x, y in zip(dv, d_out, strict=True))
        d_scores = weights * (_rows_by_rows(v, d_out) - delta[None, :])
        if problem.soft_cap is not None:
            d_scores = d_scores * (1 - scores * scores)
        if masked:
            d_scores = jnp.where(seen, d_scores, 0.0)
        dk = tuple(x + _dot(d_scores.astype(y.dtype), y) for x, y in zip(dk, q, strict=True))
        return dk, dv

    zeros = tuple(jnp.zeros((keys, width), jnp.float32) for _, width in problem.tiles)
    dk, dv = lax.fori_loop(
        jnp.int32(0),
        jnp.int32(group),
        lambda head, carry: _walk(bounds, partial(row_block, head), carry),
        (zeros, zeros),
    )
    _store(dk_ref, tuple(x * jnp.float32(problem.scale) for x in dk), keys, problem, there)
    _store(dv_ref, dv, keys, problem, there)
