"""The forward pass of dense attention on TPU, as a Mosaic kernel.

One program owns a block of query rows of a few heads, and walks the keys that its rows see. Keys that all rows see
(the *free* range) go in large blocks without a mask; the *edges* go in small ones, rows and keys cut finer, each
piece only where its own rows see something. `kernels_pallas.tpu_tiles` has what is done with one block.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs
from kernels_pallas.tpu_tiles import LOWEST, Across, Blocks, Down, Problem, Refs, scratch_shapes, visit

__all__ = ["forward_kernel"]


def _kernel(first, last, free_first, free_last, *refs, problem: Problem, chunk_size: int, with_lse: bool, measured):
    """Bounds are in edge blocks of keys: ``first, last`` a piece of rows, ``free_first, free_last`` a program."""
    blocks = problem.blocks
    start, stop, q, k, v, out, *rest = refs
    lse = rest.pop(0) if with_lse else None
    limits = None if blocks.across else rest.pop()

    def of_head(n):
        return slice(n * problem.head_dim, (n + 1) * problem.head_dim)

    load_k, load_v = (lambda n, keys: k[keys, of_head(n)]), (lambda n, keys: v[keys, of_head(n)])
    if not problem.flat:
        load_k, load_v = (lambda n, keys: k[n, keys]), (lambda n, keys: v[of_head(n), keys])
    r = Refs(start, stop, q, load_k, load_v, out, lse, *rest, limits)
    arrangement = (Across if blocks.across else Down)(problem, r)
    b, i, chunk = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    program, num_chunks, base = b * pl.num_programs(2) + i, pl.num_programs(3), chunk * chunk_size

    if measured is not None:
        _store(measured, (first, last, free_first, free_last))

    if problem.sole is None:

        @pl.when((i == 0) & (chunk == 0))
        def _():
            r.maximum[...] = jnp.full_like(r.maximum, LOWEST)  # `finish` leaves it so; the rest is as good as cleared

    @pl.when(chunk == 0)
    def _():
        arrangement.prepare()

    pieces = blocks.owned // blocks.edge_rows
    low = chunk * (chunk_size // blocks.edge_keys)
    high = low + chunk_size // blocks.edge_keys
    free = jnp.clip(free_first[program], low, high)
    ratio = blocks.keys // blocks.edge_keys
    count = jnp.maximum(jnp.clip(free_last[program], low, high) - free, 0) // ratio
    free_chains = [
        (pl.ds(part * blocks.rows, blocks.rows), head) for part in range(blocks.parts) for head in range(problem.heads)
    ]

    def free_block(n, _):
        visit(arrangement, problem, base, (free + n * ratio) * blocks.edge_keys, blocks.keys, free_chains)

    jax.lax.fori_loop(0, count, free_block, None)

    def edge_piece(piece, _):
        rows = pl.ds(pl.multiple_of(piece * blocks.edge_rows, blocks.edge_rows), blocks.edge_rows)
        begin = jnp.clip(first[program * pieces + piece], low, high)
        end = jnp.clip(last[program * pieces + piece], low, high)
        left = jnp.where(count > 0, free - begin, end - begin)
        right = jnp.where(count > 0, end - free - count * ratio, 0)

        def edge_block(n, _):
            block = jnp.where(n < left, begin + n, free + count * ratio + n - left)
            visit(
                arrangement,
                problem,
                base,
                block * blocks.edge_keys,
                blocks.edge_keys,
                [(rows, head) for head in range(problem.heads)],
                piece,
            )

        jax.lax.fori_loop(0, left + right, edge_block, None)

        if problem.sole is not None:

            @pl.when(count + left == 0)
            def _():
                arrangement.write_nothing(rows)

    jax.lax.fori_loop(0, pieces, edge_piece, None)
    if problem.sole is not None:
        return

    @pl.when(chunk == num_chunks - 1)
    def _():
        for piece in range(pieces):
            rows = pl.ds(piece * blocks.edge_rows, blocks.edge_rows)
            for head in range(problem.heads):
                arrangement.finish(piece, rows, head)


def _store(values, refs) -> None:
    """Tables into the scalar refs by the first program: for the compiler's cycle model, which reads them as zeros."""

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0) & (pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        for ref, table in zip(refs, values, strict=True):
            for n, x in enumerate(np.asarray(table).ravel().tolist()):
                ref[n] = jnp.int32(x)


def forward_kernel(
    q,
    k,
    v,
    start,
    stop,
    bounds,
    *,
    blocks: Blocks,
    num_keys,
    flat,
    groups,
    head_dim,
    with_lse,
    soft_cap,
    vmem,
    interpret,
    measured,
):
    """Call the kernel on padded arrays.

    Args:
      q: ``[B, T, N * H]`` where ``flat``, else ``[B, N * H, T]``; times the scale and log2(e) already, or the scale
        over the soft cap; T a whole number of ``blocks.owned``.
      k: ``[B, S, K * H]`` where ``flat``, else ``[B, K, S, H]``; S a whole number of chunks.
      v: ``[B, S, K * H]`` where ``flat``, else ``[B, K * H, S]``; finite where no row sees it.
      start, stop: int32 ``[B, T]``.
      bounds: four int32 ``[B * pieces]`` or ``[B * programs]``, see `_kernel`.
      num_keys: keys that are no padding.
      flat: whether heads lie side by side in lanes.
      groups: query heads of a key head.
      head_dim: H as stored.
      vmem: bytes of VMEM that the kernel may take.
      measured: the values of ``bounds``, for the compiler's cycle model; None otherwise.

    Returns:
      The output, laid out as ``q``, and the natural log-sum ``[B, N, T]`` or None.
    """
    B = q.shape[0]
    T, S = start.shape[1], k.shape[1 if flat else 2]
    K = k.shape[2] // head_dim if flat else k.shape[1]
    heads, kv_heads = _heads(groups, K, blocks.heads)
    chunk = _chunk(S, blocks)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    sole = num_keys if blocks.across and blocks.keys == blocks.edge_keys == S else None
    problem = Problem(blocks, heads, kv_heads, head_dim, flat, soft_cap, precision, sole)
    N, bq, edge = K * groups, blocks.owned, blocks.edge_rows
    programs = T // bq
    shares = max(1, groups // heads)  # programs that read the same key heads

    def key_chunk(b, i, c, first, last):
        """The chunk to have in VMEM: one that is seen, so that the others are never read."""
        pieces = bq // edge
        at = (b * programs + i) * pieces
        low, high = first[at], last[at]
        for piece in range(1, pieces):
            low, high = jnp.minimum(low, first[at + piece]), jnp.maximum(high, last[at + piece])
        per = chunk // blocks.edge_keys
        return jnp.clip(c, low // per, jnp.maximum(high - 1, low) // per)

    def kv_index(b, n, i, c, first, last, *_):
        at = key_chunk(b, i, c, first, last) if chunk < S else 0
        return at, n // shares

    if flat:
        q_spec = pl.BlockSpec((None, bq, heads * head_dim), lambda b, n, i, c, *_: (b, i, n))
        k_spec = pl.BlockSpec((None, chunk, kv_heads * head_dim), lambda b, *x: (b, *kv_index(b, *x)))
        v_spec = k_spec
    else:
        q_spec = pl.BlockSpec((None, heads * head_dim, bq), lambda b, n, i, c, *_: (b, n, i))
        k_spec = pl.BlockSpec((None, kv_heads, chunk, k.shape[3]), lambda b, *x: (b, *reversed(kv_index(b, *x)), 0))
        v_spec = pl.BlockSpec((None, kv_heads * head_dim, chunk), lambda b, *x: (b, *reversed(kv_index(b, *x))))
    if blocks.across:
        split, interval = (B, T // edge, 1, edge), (None, bq // edge, 1, edge)
        interval = pl.BlockSpec(interval, lambda b, n, i, c, *_: (b, i, 0, 0))
    else:
        split, interval = (B, T, 1), pl.BlockSpec((None, bq, 1), lambda b, n, i, c, *_: (b, i, 0))
    out_specs, out_shape = [q_spec], [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if with_lse:
        out_specs.append(pl.BlockSpec((None, None, heads, bq), lambda b, n, i, c, *_: (b, n, 0, i)))
        out_shape.append(jax.ShapeDtypeStruct((B, N // heads, heads, T), jnp.float32))
    out = pl.pallas_call(
        functools.partial(_kernel, problem=problem, chunk_size=chunk, with_lse=with_lse, measured=measured),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, N // heads, programs, S // chunk),
            in_specs=[interval, interval, q_spec, k_spec, v_spec],
            out_specs=out_specs,
            scratch_shapes=scratch_shapes(problem),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem,
        ),
        cost_estimate=costs.dense_attention(
            jax.ShapeDtypeStruct((B, T, N, head_dim), q.dtype), jax.ShapeDtypeStruct((B, S, K, head_dim), k.dtype)
        ),
        interpret=interpret,
        name="interval_attention",
    )(*bounds, start.reshape(split), stop.reshape(split), q, k, v)
    return out[0], out[1].reshape(B, N, T) if with_lse else None


def _heads(groups: int, num_kv_heads: int, most: int) -> tuple[int, int]:
    """Query and key heads of a program: a part of a group, or whole groups."""
    if groups >= most:
        return max(n for n in range(1, most + 1) if groups % n == 0), 1
    kv_heads = max(n for n in range(1, most // groups + 1) if num_kv_heads % n == 0)
    return groups * kv_heads, kv_heads


def _chunk(num_keys: int, blocks: Blocks) -> int:
    """Keys that stand in VMEM at a time."""
    chunks = -(-num_keys // blocks.resident)
    per = -(-num_keys // chunks)
    return -(-per // blocks.edge_keys) * blocks.edge_keys
