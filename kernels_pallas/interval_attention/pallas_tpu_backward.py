"""Gradients of dense attention on TPU: one Mosaic kernel makes all three, each tile of weights once.

A grid step takes a block of query rows of a few heads. The keys and values of its key heads stay in VMEM, and so do
the sums of their gradients; a loop walks the blocks of keys between the bounds of the rows' intervals:

    keys      0 .. first | first .. free_first | free_first .. free_last | free_last .. last | last .. S
    blocks    not read   | masked              | as they are             | masked            | not read

The algorithm is FlashAttention-2's (https://arxiv.org/abs/2307.08691) in a transposed form: tiles hold keys by rows,
so that what belongs to a row (its bounds, log-sum and delta) lies along lanes and no tile is ever transposed.

    s' = k q'    dp' = v do'    p' = exp2(s' - lse)    ds' = p' (dp' - delta)
    dq' += k' ds'    dk' += q' ds    dv' += do' p      a prime marks a transpose; ds and p enter transposed

Heads are pipelined by hand: products of the next head, weights of this one, gradients of the one before.

Keys that don't fit in VMEM go in chunks, one call each, and the parts of the gradient by queries are added up.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.block_bounds import block_bounds

__all__ = ["Plan", "backward", "plan_for"]

LOG2_E = math.log2(math.e)
FAR = 1e30
"""Log-sum of a row that sees no key, and minus the score of a key that a row does not see: the weight is 0."""
LANES = 128
ROW_LANES = 512
"""Lanes of queries of a grid step: four heads of 128."""
SMALL_VMEM = 32 * 2**20
ONE_TILE = 768
"""Rows and keys that are one tile where VMEM is large: a vision tower's 577 cost a quarter to a third less so."""
INTERPRETED_VMEM = 128 * 2**20
"""What interpret mode takes for the size of VMEM: that of v5e and v6e."""


class Plan(NamedTuple):
    """How a call is cut.

    Attributes:
      rows: query rows of a grid step. A multiple of 128.
      keys: keys of a tile that needs no mask. A multiple of ``edge_keys``.
      edge_keys: keys of a masked tile, a multiple of 128.
      key_heads: key heads of a grid step.
      group: query heads of each of them in a grid step; fewer than there are only with one key head.
      chunk: keys of a call, a multiple of ``edge_keys``.
    """

    rows: int
    keys: int
    edge_keys: int
    key_heads: int
    group: int
    chunk: int


class _Problem(NamedTuple):
    """Static facts of a call; ``width`` is the head dimension in whole lanes, ``tables`` are for measuring only."""

    plan: Plan
    head_dim: int
    width: int
    scale: float
    soft_cap: float | None
    dtype: jnp.dtype
    tables: tuple[tuple[int, ...], ...] | None = None

    @property
    def heads(self) -> int:
        """Query heads of a grid step."""
        return self.plan.key_heads * self.plan.group

    @property
    def used_width(self) -> int:
        """The head dimension in whole sublanes: what products that make it their rows need to do."""
        return _round_up(self.head_dim, 16)


def backward(
    q, k, v, kv_start, kv_stop, lse, delta, d_out, *, scale, soft_cap, interpret, measured=None, plan=None
):  # fmt: skip
    """Gradients by q, k and v, in their dtypes.

    Args:
      q: ``[B, T, N, H]``. k, v: ``[B, S, K, H]``, of the same dtype: bfloat16 or float32.
      kv_start, kv_stop: int32 ``[B, T]``; a row with ``kv_stop <= kv_start`` adds nothing, whatever it holds.
      lse: natural logarithm of the rows' sums of exponentials, float32 ``[B, T, N]``.
      delta: ``sum_h(d_out * out) - d_lse``, float32 ``[B, T, N]``.
      d_out: gradient by the output, ``[B, T, N, H]``.
      scale: factor on the scores. soft_cap: scores became ``soft_cap * tanh(scores / soft_cap)`` before masking.
      interpret: as `jax.experimental.pallas.pallas_call` takes it.
      measured: NumPy ``(kv_start, kv_stop)`` that the kernel stores itself in its first step. The compiler's cycle
        model reads scalar operands as 0, but follows stores.
      plan: in place of `plan_for`'s.

    Raises:
      NotImplementedError: a dtype that the kernel can't do.
      ValueError: a plan that doesn't fit the shapes, or ``measured`` with keys in more than one chunk.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            f"the TPU kernel takes q, k and v of one dtype, bfloat16 or float32; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    vmem = INTERPRETED_VMEM if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
    plan = plan or plan_for(T, S, N, K, H, q.dtype.itemsize, vmem)
    if K % plan.key_heads or (N // K) % plan.group or (plan.key_heads > 1 and plan.group * K != N):
        raise ValueError(f"{plan} doesn't divide {N} query and {K} key heads")
    if plan.rows % LANES or plan.edge_keys % LANES or plan.keys % plan.edge_keys or plan.chunk % plan.edge_keys:
        raise ValueError(f"blocks of {plan} are not multiples of {LANES} and of each other")
    problem = _Problem(plan, H, _round_up(H, LANES), float(scale), soft_cap, q.dtype)
    rows, chunk = _round_up(T, plan.rows), min(plan.chunk, _round_up(S, plan.edge_keys))
    chunks = pl.cdiv(S, chunk)

    q, d_out = (_flat(x.astype(q.dtype), rows, problem.width) for x in (q, d_out))
    k, v = (_flat(x, chunks * chunk, problem.width) for x in (k, v))
    start, stop = (_pad(x, rows) for x in (kv_start, kv_stop))
    stats = jnp.stack([_pad(lse, rows) * LOG2_E, _pad(delta, rows)], axis=1)
    stats = stats.reshape(B, 2, rows, -1, problem.heads).transpose(0, 3, 1, 4, 2)  # [B, N / heads, 2, heads, T]
    stats = stats.reshape(B, -1, 2 * problem.heads, rows)
    if measured is not None:
        if chunks > 1:
            raise ValueError(f"measured takes keys of one chunk; {S} keys make {chunks} of {chunk}")
        tables = _tables(*(np.pad(x, [(0, 0), (0, rows - T)]) for x in measured), plan)
        problem = problem._replace(tables=tuple(tuple(x.ravel().tolist()) for x in tables))

    call = partial(_call, problem, vmem=vmem, interpret=interpret)
    if chunks == 1:
        dq, dk, dv = call(q, k, v, start, stop, stats, d_out, dq_dtype=q.dtype)
    else:

        def add_chunk(dq, chunk_of):
            k, v, begin = chunk_of
            bounds = (jnp.clip(x - begin, 0, chunk) for x in (start, stop))
            more, dk, dv = call(q, k, v, *bounds, stats, d_out, dq_dtype=jnp.float32)
            return dq + more, (dk, dv)

        begins = jnp.arange(chunks, dtype=jnp.int32) * chunk
        cut = [jnp.swapaxes(x.reshape(B, chunks, chunk, -1), 0, 1) for x in (k, v)]
        dq, (dk, dv) = lax.scan(add_chunk, jnp.zeros(q.shape, jnp.float32), (*cut, begins))
        dq = dq.astype(q.dtype)
        dk, dv = (jnp.swapaxes(x, 0, 1).reshape(k.shape) for x in (dk, dv))
    return tuple(
        x.reshape(B, -1, heads, problem.width)[:, :length, :, :H]
        for x, length, heads in ((dq, T, N), (dk, S, K), (dv, S, K))
    )


def plan_for(T: int, S: int, N: int, K: int, H: int, itemsize: int, vmem: int) -> Plan:
    """How to cut a call with ``itemsize`` bytes an element, on a chip with ``vmem`` bytes of VMEM a core."""
    width, group = _round_up(H, LANES), N // K
    most = max(1, ROW_LANES // width)
    per_step = _divisor(group, most)
    if vmem > SMALL_VMEM and max(T, S) <= ONE_TILE:
        rows, edge = _round_up(T, LANES), _round_up(S, LANES)
        keys = edge
    else:
        rows, edge = _block(T), _block(S)
        keys = 2 * edge if vmem > SMALL_VMEM and edge < S else edge
    whole = _round_up(S, edge)

    def fits(key_heads):
        # Queries, d_out and dq twice (copies overlap), the transposed two, the sum; then tiles of scores.
        step = rows * key_heads * per_step * width * (8 * itemsize + 4) + 10 * rows * keys * 4
        # Keys, values and their gradients twice, and the sums.
        key = key_heads * width * (8 * itemsize + 8)
        return (vmem * 3 // 4 - step) // key // edge * edge

    heads = [n for n in range(1, K + 1) if K % n == 0 and n * group <= most] if per_step == group else [1]
    if heads == [1] and group == 1:
        heads.append(_divisor(K, most))
    key_heads = max([n for n in heads if fits(n) >= min(whole, 2048)], default=1)
    return Plan(rows, keys, edge, key_heads, per_step, max(edge, min(whole, fits(key_heads))))


def _divisor(heads: int, most: int) -> int:
    """Largest divisor up to ``most``; for a prime beyond it, itself up to twice as much, as one head alone is slow."""
    best = max(n for n in range(1, most + 1) if heads % n == 0)
    if best == 1 and most > 1:
        best = min((n for n in range(most, 2 * most) if heads % n == 0), default=1)
    return best


def _block(length: int) -> int:
    """256, or 128 where that saves more than a tenth of the work at a ragged end."""
    return 256 if _round_up(length, 256) <= 1.1 * _round_up(length, 128) else 128


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _pad(x, length: int):
    """Zeros after axis 1; a padded row has an empty interval."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _flat(x, length: int, width: int):
    """``[B, X, N, H]`` to ``[B, length, N * width]``; free for a head dimension in whole lanes."""
    x = jnp.pad(_pad(x, length), [(0, 0)] * 3 + [(0, width - x.shape[3])])
    return x.reshape(*x.shape[:2], -1)


def _tables(start, stop, plan: Plan):
    """Bounds of each row block in blocks of ``edge_keys``: first, last, first free, last free."""
    return block_bounds(start, stop, block_q=plan.rows, block_k=plan.edge_keys, ignore_empty=True)


def _call(problem: _Problem, q, k, v, start, stop, stats, d_out, *, dq_dtype, vmem, interpret):
    """Gradients of flat ``[B, T, N * width]`` by flat ``[B, S, K * width]``, whole blocks."""
    plan, width = problem.plan, problem.width
    (B, T, _), S = q.shape, k.shape[1]
    row_lanes, key_lanes = problem.heads * width, plan.key_heads * width
    parts = q.shape[2] // k.shape[2] // plan.group  # of a group of query heads
    rows = pl.BlockSpec((None, plan.rows, row_lanes), lambda b, n, g, i, *_: (b, i, n * parts + g))
    keys = pl.BlockSpec((None, S, key_lanes), lambda b, n, g, i, *_: (b, 0, n))
    return pl.pallas_call(
        partial(_kernel, problem),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, k.shape[2] // key_lanes, parts, T // plan.rows),
            in_specs=[
                pl.BlockSpec((None, 2, plan.rows), lambda b, n, g, i, *_: (b, 0, i)),
                pl.BlockSpec(
                    (None, None, 2 * problem.heads, plan.rows), lambda b, n, g, i, *_: (b, n * parts + g, 0, i)
                ),
                rows,
                rows,
                keys,
                keys,
            ],
            out_specs=[rows, keys, keys],
            scratch_shapes=[
                pltpu.VMEM((2 * problem.heads, plan.rows), jnp.float32),
                *[pltpu.VMEM((row_lanes, plan.rows), q.dtype)] * 2,
                pltpu.VMEM((row_lanes, plan.rows), jnp.float32),
                *[pltpu.VMEM((key_lanes, S), jnp.float32)] * 2,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in ((q, dq_dtype), (k, k.dtype), (v, v.dtype))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem * 15 // 16
        ),
        interpret=interpret,
        name="interval_attention_backward",
    )(*(x.reshape(-1) for x in _tables(start, stop, plan)), jnp.stack([start, stop], axis=1), stats, q, d_out, k, v)


def _kernel(
    problem: _Problem,
    first_ref, last_ref, free_first_ref, free_last_ref, bounds_ref, stats_ref, q_ref, d_out_ref, k_ref, v_ref,
    dq_ref, dk_ref, dv_ref,
    row_ref, qt_ref, d_outt_ref, dqt_ref, dkt_ref, dvt_ref,
):  # fmt: skip
    """One block of rows of ``heads`` heads. A ``t`` marks what is transposed: heads by rows, tokens by lanes."""
    plan, width, heads = problem.plan, problem.width, problem.heads
    b, n, g, i = (pl.program_id(axis) for axis in range(4))
    tables = first_ref, last_ref, free_first_ref, free_last_ref

    if problem.tables is not None:

        @pl.when((b == 0) & (n == 0) & (g == 0) & (i == 0))
        def _():
            for ref, table in zip(tables, problem.tables, strict=True):
                for at, x in enumerate(table):
                    ref[at] = jnp.int32(x)

    @pl.when((g == 0) & (i == 0))
    def _():
        dkt_ref[...] = jnp.zeros_like(dkt_ref)
        dvt_ref[...] = jnp.zeros_like(dvt_ref)

    # An empty row may hold NaN. With these values it adds nothing, not even in a tile that isn't masked.
    seeing = bounds_ref[1:2] > bounds_ref[0:1]  # [1, rows]
    row_ref[:heads] = jnp.where(seeing, stats_ref[:heads], FAR)
    row_ref[heads:] = jnp.where(seeing, stats_ref[heads:], 0)
    for h in range(heads):
        lanes = _head(h, width)
        for ref, rows_ref in ((qt_ref, q_ref), (d_outt_ref, d_out_ref)):
            ref[lanes] = _keep(seeing, rows_ref[:, lanes].T)
    dqt_ref[...] = jnp.zeros_like(dqt_ref)

    first, last, free_first, free_last = (ref[b * pl.num_programs(3) + i] for ref in tables)
    coarse = plan.keys // plan.edge_keys
    num_free = (free_last - free_first) // coarse
    rest = free_first + num_free * coarse
    before = free_first - first

    def tile(j, masked):
        refs = row_ref, k_ref, v_ref, qt_ref, d_outt_ref, dqt_ref, dkt_ref, dvt_ref
        _tile(problem, j, masked, bounds_ref, *refs)

    def edge(t, _):
        tile(jnp.where(t < before, first + t, rest + t - before), True)

    def free(t, _):
        tile(free_first + t * coarse, False)

    if k_ref.shape[0] == plan.edge_keys:  # one tile: a mask costs less than a second body to compile
        lax.fori_loop(0, last, lambda j, _: tile(j, True), None)
    else:
        lax.fori_loop(0, before + last - rest, edge, None)
        lax.fori_loop(0, num_free, free, None)
    for h in range(heads):
        lanes = _head(h, width)
        dq_ref[:, lanes] = (dqt_ref[lanes].T * problem.scale).astype(dq_ref.dtype)

    @pl.when((g == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        def write(j, _):
            keys = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
            dk_ref[keys] = (dkt_ref[:, keys].T * problem.scale).astype(dk_ref.dtype)
            dv_ref[keys] = dvt_ref[:, keys].T.astype(dv_ref.dtype)

        lax.fori_loop(0, dk_ref.shape[0] // LANES, write, None)


def _tile(
    problem: _Problem, j, masked: bool,
    bounds_ref, row_ref, k_ref, v_ref, qt_ref, d_outt_ref, dqt_ref, dkt_ref, dvt_ref,
):  # fmt: skip
    """Adds what the keys from ``j * edge_keys`` on make of all three gradients, for every head of the step."""
    plan, width, used, heads = problem.plan, problem.width, problem.used_width, problem.heads
    length = plan.edge_keys if masked else plan.keys
    keys = pl.ds(pl.multiple_of(j * plan.edge_keys, plan.edge_keys), length)
    ks, vs = ([ref[keys, _head(h, width)] for h in range(plan.key_heads)] for ref in (k_ref, v_ref))
    seen = None
    if masked:
        at = j * plan.edge_keys + lax.broadcasted_iota(jnp.int32, (length, plan.rows), 0)
        seen = (at >= bounds_ref[0:1]) & (at < bounds_ref[1:2])
        some = jnp.max(seen.astype(jnp.float32), axis=1, keepdims=True) > 0
        ks, vs = ([_keep(some, x) for x in xs] for xs in (ks, vs))  # a key that no row sees may hold NaN
    kts = [x.T for x in ks]

    def products(h):
        key_head = h // plan.group
        lanes = _head(h, width)
        return _dot(ks[key_head], qt_ref[lanes]), _dot(vs[key_head], d_outt_ref[lanes])

    def weights(h, raw, d_weights):
        if problem.soft_cap is None:
            log2 = raw * (problem.scale * LOG2_E)
        else:
            capped = jnp.tanh(raw * (problem.scale / problem.soft_cap))
            log2 = capped * (problem.soft_cap * LOG2_E)
        log2 = log2 - row_ref[h : h + 1]
        p = jnp.exp2(log2 if seen is None else jnp.where(seen, log2, -FAR))
        ds = p * (d_weights - row_ref[heads + h : heads + h + 1])
        if problem.soft_cap is not None:
            ds = ds * (1 - capped * capped)
        return p.astype(problem.dtype), ds.astype(problem.dtype)

    def gradients(h, p, ds):
        key_head = h // plan.group
        row, key = h * width, key_head * width
        dvt_ref[key : key + used, keys] += _dot(d_outt_ref[row : row + used], p, transposed=True)
        dkt_ref[key : key + used, keys] += _dot(qt_ref[row : row + used], ds, transposed=True)
        dqt_ref[row : row + used] += _dot(kts[key_head][:used], ds)

    ahead, done = products(0), None
    for h in range(heads):
        now = ahead
        if h + 1 < heads:
            ahead = products(h + 1)
        new = weights(h, *now)
        if done is not None:
            gradients(h - 1, *done)
        done = new
    gradients(heads - 1, *done)


def _head(h: int, width: int) -> slice:
    return slice(h * width, (h + 1) * width)


def _keep(seen, x):
    """``x``, and 0 where not seen, whatever stands there.

    By way of float32, as v5e has no vector unit for bfloat16, and by its bits: a select before a narrowing cast has
    made the compiler (libtpu 0.0.52) end the process.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & jnp.where(seen, -1, 0)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(x.dtype)


def _dot(a, b, *, transposed=False):
    """Product in float32 of ``a`` and ``b``, or its transpose; of float32 in full precision."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1,) if transposed else (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
