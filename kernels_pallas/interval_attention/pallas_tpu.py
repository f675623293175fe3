"""Dense attention on TPU: what surrounds the Mosaic kernels, forward and backward.

Arrays go to the kernel as models have them where the head dimension is a multiple of 128 (*flat*: heads side by side
in lanes, a free reshape); else heads stand in sublanes and rows in lanes, which wastes no lane on padding.
"""

import math

import jax.numpy as jnp
import numpy as np

from kernels_pallas.interval_attention.pallas_tpu_backward import backward
from kernels_pallas.interval_attention.pallas_tpu_forward import forward_kernel
from kernels_pallas.tpu_tiles import LANES, Blocks

__all__ = ["backward", "edges", "forward"]

BLOCKS = Blocks(
    across=False, rows=512, parts=1, keys=512, edge_rows=256, edge_keys=256, heads=4, step=256, resident=6144
)


def forward(q, k, v, kv_start, kv_stop, *, scale, soft_cap, interpret, with_lse=True, blocks=BLOCKS, measured=None):
    """See `kernels_pallas.interval_attention.interval_attention`; ``[B, T, N, H]`` and log-sums ``[B, T, N]``.

    Args:
      blocks: how to cut the problem; None takes the table's entry for the device.
      measured: intervals ``(start, stop)`` as NumPy arrays ``[B, T]`` that the compiler's cycle model is to follow.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    flat = H % LANES == 0
    if not (flat or blocks.across):
        raise ValueError(f"head dimension {H} needs blocks that go across")
    blocks = _fit(blocks, T, S)
    factor = scale * math.log2(math.e) if soft_cap is None else scale / soft_cap
    q = (q.astype(jnp.float32) * jnp.float32(factor)).astype(q.dtype)
    v = jnp.where(_seen(kv_start, kv_stop, S)[..., None, None], v, jnp.zeros((), v.dtype))
    more_rows, more_keys = -T % blocks.owned, -S % (blocks.edge_keys * -(-S // blocks.resident))
    start, stop = (jnp.pad(x, ((0, 0), (0, more_rows))) for x in (kv_start, kv_stop))
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
        edges(start, stop, blocks, jnp),
        blocks=blocks,
        flat=flat,
        groups=N // K,
        head_dim=stored,
        with_lse=with_lse,
        soft_cap=soft_cap,
        interpret=interpret,
        measured=None if measured is None else edges(*(_pad_rows(x, more_rows) for x in measured), blocks, np),
    )
    out = out.reshape(B, -1, N, H) if flat else out.reshape(B, N, stored, -1)[:, :, :H].transpose(0, 3, 1, 2)
    return out[:, :T], lse[:, :, :T].transpose(0, 2, 1) if with_lse else None


def _pad_rows(x, count):
    return np.pad(np.asarray(x), ((0, 0), (0, count)))


def _fit(blocks: Blocks, num_rows: int, num_keys: int) -> Blocks:
    """Blocks no larger than the problem."""
    return blocks


def edges(start, stop, blocks: Blocks, xp):
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
    free_high = xp.where(occupied, stop, 0).reshape(shape).min(axis=1) // size
    return tuple(x.astype(xp.int32) for x in (low // size, -(-high // size), free_low, free_high))


def _seen(start, stop, num_keys: int):
    """Whether any row sees each key ``[B, S]``: pair by pair, which XLA fuses into one pass without a buffer."""
    keys = jnp.arange(num_keys, dtype=jnp.int32)[None, :, None]
    return ((start[:, None] <= keys) & (keys < stop[:, None])).any(axis=2)
