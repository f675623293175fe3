"""Dense attention on TPU: what surrounds the Mosaic kernels, forward and backward.

Arrays go to the kernel as models have them where the head dimension is a multiple of 128 (*flat*: heads side by side
in lanes, a free reshape); else heads stand in sublanes and rows in lanes, which wastes no lane on padding.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import block_sizes
from kernels_pallas.interval_attention.pallas_tpu_backward import backward
from kernels_pallas.interval_attention.pallas_tpu_forward import forward_kernel
from kernels_pallas.tpu_tiles import LANES, Blocks

__all__ = ["backward", "edges", "forward"]

INTERPRETED_VMEM = 64 << 20
"""Bytes of VMEM that interpreted kernels are cut for."""
DTYPES = ("bfloat16", "float32")


def forward(q, k, v, kv_start, kv_stop, *, scale, soft_cap, interpret, with_lse=True, blocks=None, measured=None):
    """See `kernels_pallas.interval_attention.interval_attention`; ``[B, T, N, H]`` and log-sums ``[B, T, N]``.

    Args:
      with_lse: whether to give log-sums; None in their place otherwise.
      blocks: how to cut the problem; None takes the table's entry for the chip.
      measured: intervals ``(start, stop)`` as NumPy arrays ``[B, T]`` that the compiler's cycle model is to follow.

    Raises:
      NotImplementedError: a dtype or chip that the kernel can't do.
    """
    if q.dtype.name not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            f"pallas_tpu takes q, k and v of one dtype, {' or '.join(DTYPES)}; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if 0 in (B, T, S):
        return jnp.zeros_like(q), jnp.full((B, T, N), -jnp.inf) if with_lse else None
    flat = H % LANES == 0
    vmem, chip = INTERPRETED_VMEM, "v5e"
    if not interpret:
        info = pltpu.get_tpu_info()
        vmem, chip = int(0.9 * info.vmem_capacity_bytes), block_sizes.CHIPS[info.mxu_column_size]
    if blocks is None:
        blocks = block_sizes.blocks_for(chip, T, S, B * N, N // K, H, q.dtype.itemsize, vmem * 3 // 4)
    if not (flat or blocks.across):
        raise ValueError(f"head dimension {H} is no multiple of {LANES}: it needs blocks that go across, not {blocks}")
    factor = scale * math.log2(math.e) if soft_cap is None else scale / soft_cap
    q = (q.astype(jnp.float32) * jnp.float32(factor)).astype(q.dtype)
    v = jnp.where(_seen(kv_start, kv_stop, S)[..., None, None], v, jnp.zeros((), v.dtype))
    more_rows, more_keys = -T % blocks.owned, -S % (blocks.edge_keys * -(-S // blocks.resident))
    # Rows of padding see what the last row does: empty ones would keep a block from being free.
    start, stop = (jnp.pad(x, ((0, 0), (0, more_rows)), mode="edge") for x in (kv_start, kv_stop))
    q = jnp.pad(q, ((0, 0), (0, more_rows), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, more_keys), (0, 0), (0, 0))) for x in (k, v))
    stored = H
    if flat:
        q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    else:
        stored = H + -H % (32 // q.dtype.itemsize)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, stored - H))) for x in (q, k, v))
        q, v = (x.transpose(0, 2, 3, 1).reshape(B, -1, x.shape[1]) for x in (q, v))
        k = k.transpose(0, 2, 1, 3)
    out, lse = forward_kernel(
        q,
        k,
        v,
        start,
        stop,
        edges(start, stop, S, blocks, jnp),
        blocks=blocks,
        num_keys=S,
        flat=flat,
        groups=N // K,
        head_dim=stored,
        with_lse=with_lse,
        soft_cap=soft_cap,
        vmem=vmem,
        interpret=interpret,
        measured=None if measured is None else edges(*(_pad_rows(x, more_rows) for x in measured), S, blocks, np),
    )
    out = out.reshape(B, -1, N, H) if flat else out.reshape(B, N, stored, -1)[:, :, :H].transpose(0, 3, 1, 2)
    return out[:, :T], lse[:, :, :T].transpose(0, 2, 1) if with_lse else None


def _pad_rows(x, count):
    return np.pad(np.asarray(x), ((0, 0), (0, count)), mode="edge")


def edges(start, stop, num_keys: int, blocks: Blocks, xp):
    """The kernel's bounds in edge blocks of keys: first and last of each piece of rows, free range of each program.

    Args:
      start, stop: intervals ``[B, T]``, T a whole number of ``blocks.owned``.
      xp: `jax.numpy`, or `numpy` on the host.
    """
    occupied = stop > start
    shape = (-1, blocks.edge_rows)
    low = xp.where(occupied, start, 2**30).reshape(shape).min(axis=1)
    high = xp.where(occupied, stop, 0).reshape(shape).max(axis=1)
    low = xp.where(high > 0, low, 0)
    size = blocks.edge_keys
    shape = (-1, blocks.owned)
    free_low = -(-start.reshape(shape).max(axis=1) // size)
    free_high = xp.where(occupied, stop, 0).reshape(shape).min(axis=1)
    if num_keys <= blocks.keys == size:  # one block: the kernel knows where its padding begins
        free_high = xp.where(free_high == num_keys, size, free_high)
    free_high = free_high // size
    return tuple(x.astype(xp.int32) for x in (low // size, -(-high // size), free_low, free_high))


def _seen(start, stop, num_keys: int):
    """Whether any row sees each key ``[B, S]``: pair by pair, which XLA fuses into one pass without a buffer."""
    keys = jnp.arange(num_keys, dtype=jnp.int32)[None, :, None]
    return ((start[:, None] <= keys) & (keys < stop[:, None])).any(axis=2)
