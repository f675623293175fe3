"""JAX's own TPU kernels on a case, as `kernels_pallas.compile_only.tpu` takes them, for the compiler's estimate alone.

The compiler's cycle model reads scalar-prefetch operands as zeros, which would make what the kernels skip free. So
the `pallas_call` that they use is wrapped while they are traced: the first grid step stores the real tables into the
scalar operands, and then runs the kernel as it is. A kernel so traced must not be run.

Operands stand as each peer likes them best (heads first; keys and values by page, heads interleaved). What brings
them there, and what makes a mask, is not counted.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import contextlib
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from kernels_pallas.benchmark.cases import CASES, Case, Dense, Paged, Write, estimated
from kernels_pallas.benchmark.tpu_ours import array
from kernels_pallas.intervals import to_mask

__all__ = ["PEERS", "build", "kernels", "obstacle"]

LANES = 128
RAGGED_VMEM = 100 * 2**20
PAGE_SIZE = 64
"""Where a dense case is put in pages."""
SHARE = 4
"""The ragged kernel is measured on one part in so many."""
PEERS = {
    "splash": "splash_attention, the mask known when it is traced",
    "splash at run time": "splash_attention, the mask known when it runs",
    "splash segments": "splash_attention with segment ids, which also tell padding from patches",
    "flash": "flash_attention",
    "ragged": "ragged_paged_attention",
}
"""What each is."""


def obstacle(peer: str, case: Case) -> str | None:
    """Why a peer can't do a case, or None where it can."""
    if isinstance(case, Write):
        return "writes no pages"
    if peer == "ragged":
        if isinstance(case, Paged):
            return None
        if case.backward:
            return "has no gradients"
        return None if case.mask in ("causal", "packed") else "its mask is causal, with a window at most"
    if isinstance(case, Paged):
        return "reads no pages"
    if peer == "splash segments" and case.mask not in ("packed", "full"):
        return "the case has no segments"
    if peer == "splash at run time" and case.mask != "window and spans":
        return "measured where the mask depends on the input"
    return None


def build(case: str, peer: str, blocks, roughly: bool = False):
    """What to compile for a peer on a case of `CASES`, at its measured part; ``blocks`` as in `BLOCKS`."""
    part, _ = measured_part(peer, CASES[case], roughly)
    if peer == "ragged":
        return _ragged(part, blocks)
    return _flash(part, blocks) if peer == "flash" else _splash(part, blocks, peer)


def measured_part(peer: str, case: Case, roughly: bool = False) -> tuple[Case, int]:
    """What is compiled of a case for an estimate, and how many of it make the case.

    Splash and flash attention do one head after another, the ragged kernel one request after another; of a single
    request it gets a quarter of the heads. ``roughly``: one sequence, or one head of a long one, which is 5 to 10% too
    high by what a call costs once; good enough to compare blocks.
    """
    if peer != "ragged":
        if roughly:
            some = case.part if case.batch > 1 else dataclasses.replace(case, num_heads=1, num_kv_heads=1)
            return some, case.flops() // some.flops()
        some, parts = estimated(case)
        if peer != "flash":  # takes one sequence; of a batch all see the same, so that more heads are as good
            N, K = (some.batch * n for n in (some.num_heads, some.num_kv_heads))
            some = dataclasses.replace(some, batch=1, num_heads=N, num_kv_heads=K)
        return some, parts
    if isinstance(case, Dense) and case.whole:
        return _in_pages(case), 1
    case = _in_pages(case)
    if all(case.requests.count(kind) % SHARE == 0 for kind in set(case.requests)):
        return dataclasses.replace(case, requests=case.requests[::SHARE]), SHARE
    return dataclasses.replace(case, parts=SHARE).part, SHARE


def _in_pages(case: Dense | Paged) -> Paged:
    """Dense causal attention as that of requests that have just come; segments of one length become requests."""
    if isinstance(case, Paged):
        return case
    starts = np.unique(case.intervals().start)
    length = case.length // len(starts)
    heads = dict(num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim)
    return Paged(about=case.about, requests=((length, length),) * len(starts), page_size=PAGE_SIZE, **heads)


def kernels(case: Case) -> list[str]:
    """Names of the ops to look at, as `storing` makes them."""
    if isinstance(case, Dense) and case.backward:
        return ["peer_dkv.1", "peer_dq.1"]
    return ["peer_forward.1"]


@contextlib.contextmanager
def storing(**tables):
    """While traced, a kernel named like ``dq`` or ``dkv``, or else ``forward``, first stores the tables of this name.

    They are NumPy arrays in the order of the scalar operands, None where nothing is to be stored. The op is called
    "peer_forward" and so on.
    """
    original = pl.pallas_call

    def pallas_call(kernel, *args, **options):
        function = kernel
        while isinstance(function, functools.partial):
            function = function.func
        role = next((role for role in ("dkv", "dq") if f"_{role}_" in function.__name__), "forward")
        grid = options["grid_spec"].grid

        def storing_first(*refs):
            @pl.when(functools.reduce(operator.and_, [pl.program_id(axis) == 0 for axis in range(len(grid))]))
            def _():
                for ref, table in zip(refs, tables.get(role, ()), strict=False):
                    for index, x in np.ndenumerate(table) if table is not None else ():
                        if x:
                            ref[index] = jnp.int32(int(x))

            kernel(*refs)

        return original(storing_first, *args, **options | {"name": f"peer_{role}"})

    pl.pallas_call = pallas_call
    try:
        yield
    finally:
        pl.pallas_call = original


def _splash(case: Dense, blocks, peer: str):
    N, K, H = case.num_heads, case.num_kv_heads, case.head_dim
    bq, bkv, compute = blocks
    T = -(-case.length // max(bq, bkv)) * max(bq, bkv)
    sizes = dict(block_q=bq, block_kv=bkv, block_kv_compute=compute)
    if case.backward:
        sizes |= dict(block_q_dkv=bq, block_kv_dkv=bkv, block_kv_dkv_compute=compute, block_q_dq=bq, block_kv_dq=bkv)
    sizes = splash.BlockSizes(**sizes)
    options = dict(block_sizes=sizes, head_shards=1, q_seq_shards=1, downcast_smem_data=False)
    segmented = peer == "splash segments"
    if case.mask == "causal" or segmented:
        mask = (splash_mask.FullMask if case.mask == "full" else splash_mask.CausalMask)((T, T))
    else:
        mask = np.zeros((T, T), bool)
        mask[: case.length, : case.length] = to_mask(case.intervals(), case.length)[0]
        mask[case.length :, 0] = True  # a row has to see something
        if peer != "splash at run time":
            mask = splash_mask.NumpyMask(mask)
    if peer == "splash at run time":
        mask = jnp.broadcast_to(jnp.asarray(mask), (N, T, T))
    else:
        mask = splash_mask.MultiHeadMask([mask] * N)
    kernel = splash.make_splash_mha(mask, **options)
    # The flag is for the name of a scope alone.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=None)
    infos = {"forward": kernel.fwd_mask_info, "dq": kernel.dq_mask_info, "dkv": kernel.dkv_mask_info}
    tables = {
        role: [None if x is None else np.asarray(x) for x in (info.data_next, info.block_mask, info.mask_next)]
        for role, info in infos.items()
        if info is not None
    }
    operands = [jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), kernel)]
    W = -(-H // LANES) * LANES  # in whole lanes: what fills them up is not counted
    operands += [array(N, T, W), array(K, T, W), array(K, T, W)]
    if segmented:
        operands.append(splash.SegmentIds(array(T, dtype=jnp.int32), array(T, dtype=jnp.int32)))

    def function(kernel, q, k, v, segments=None, *d_out):
        with storing(**tables):
            if not case.backward:
                return kernel(q, k, v, segments)
            return jax.vjp(kernel, q, k, v)[1](*d_out)

    if case.backward:
        operands += [None, operands[1]]
    return function, tuple(operands)


def _flash(case: Dense, blocks):
    B, N, H, T = case.batch, case.num_heads, case.head_dim, case.length
    bq, major, bk = blocks
    T = -(-T // major) * major
    bq = min(bq, T)
    sizes = dict(block_b=1, block_q=bq, block_k_major=major, block_k=bk)
    if case.backward:
        sizes |= dict(block_q_major_dkv=bq, block_k_major_dkv=major, block_k_dkv=bk, block_q_dkv=bq)
        sizes |= dict(block_k_major_dq=major, block_k_dq=bk, block_q_dq=bq)
    sizes = flash.BlockSizes(**sizes)
    causal = case.mask in ("causal", "packed")
    # Each query head with its own key head, in whole lanes: what fills them up isn't counted.
    head = array(B, N, T, -(-H // LANES) * LANES)
    bias = segments = None
    if case.mask == "packed" or (case.mask == "full" and case.length != T):
        segments = flash.SegmentIds(array(B, T, dtype=jnp.int32), array(B, T, dtype=jnp.int32))
    elif not causal and case.mask != "full":
        bias = array(B, N, T, T)

    def function(q, k, v, bias, segments, *d_out):
        def attend(q, k, v):
            return flash.flash_attention(q, k, v, bias, segments, causal=causal, sm_scale=H**-0.5, block_sizes=sizes)

        with storing():
            return jax.vjp(attend, q, k, v)[1](*d_out) if case.backward else attend(q, k, v)

    return function, (head, head, head, bias, segments, *([head] if case.backward else []))


def _ragged(case: Paged, blocks):
    keys_per_block, rows_per_block = blocks
    requests, page_size = case.requests, case.page_size
    keys, rows = np.array(requests).T
    pages = -(-keys.max() // page_size)
    R, T = len(keys), int(rows.sum())
    ends = np.cumsum([0, *rows])
    q = array(T, case.num_heads, case.head_dim)
    cache = array(int(R * pages), page_size, 2 * case.num_kv_heads, case.head_dim)
    ints = [array(*shape, dtype=jnp.int32) for shape in ((R,), (R, int(pages)), (R + 1,), (1,))]

    def function(*operands):
        with storing(forward=(keys, None, ends, None, np.array([R]))):
            return ragged.ragged_paged_attention(
                *operands,
                sm_scale=case.head_dim**-0.5,
                sliding_window=case.window,
                num_kv_pages_per_block=min(keys_per_block // page_size, int(pages)),
                num_queries_per_block=rows_per_block,
                vmem_limit_bytes=RAGGED_VMEM,
            )

    return function, (q, cache, *ints)
