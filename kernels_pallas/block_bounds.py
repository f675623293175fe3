"""Which blocks of keys a block of rows sees, and the other way round, from the row intervals alone.

    rows 4..7 of a causal mask, keys in blocks of 2:     j    0    1    2    3    4
    . not seen   # seen                                       ##   ##   #.   ..   ..
                                                              ##   ##   ##   ..   ..
    [first, last) = [0, 4), blocks that any row sees          ##   ##   ##   #.   ..
    [free_first, free_last) = [0, 2), seen whole by all       ##   ##   ##   ##   ..

The same functions serve the host (NumPy arrays in, NumPy arrays out) and the device (inside `jax.jit` too).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

__all__ = ["BlockBounds", "RowBlockBounds", "block_bounds", "row_block_bounds"]

MOST = 2**31 - 1


class BlockBounds(NamedTuple):
    """Per row block, int32 ``[..., ceil(T / block_q)]``, in key blocks.

    ``first <= free_first <= free_last <= last``. Blocks of ``[first, last)`` outside the free range need their scores
    masked; without a free block, ``free_first = free_last = last``, and without a seen one all are 0.
    """

    first: Int[Array | np.ndarray, "..."]
    last: Int[Array | np.ndarray, "..."]
    free_first: Int[Array | np.ndarray, "..."]
    free_last: Int[Array | np.ndarray, "..."]


class RowBlockBounds(NamedTuple):
    """Per key block, int32 ``[..., ceil(S / block_k)]``, in row blocks; both are 0 where no row sees the block."""

    first: Int[Array | np.ndarray, "..."]
    last: Int[Array | np.ndarray, "..."]


def block_bounds(
    start: Int[Array | np.ndarray, "*B T"],
    stop: Int[Array | np.ndarray, "*B T"],
    *,
    block_q: int,
    block_k: int,
    ignore_padding: bool = False,
    ignore_empty: bool = False,
) -> BlockBounds:
    """The key blocks that each block of ``block_q`` rows sees: the hull of its rows, and what of it needs no mask.

    A key block is free where every row sees it whole; never so the rest of a block at the end of the keys. The last
    row block is filled up with empty rows, which see nothing and so leave it no free block.

    Args:
      ignore_padding: rows that fill up the last block don't count: for a kernel that drops their output.
      ignore_empty: nor does any other empty row: for a kernel that clears their output (and, going backward, what
        they would add to gradients).

    Raises:
      ValueError: a block size below 1, or intervals that are not int32 of one shape ``[..., T]``.
    """
    _check(start, stop, block_q, block_k)
    xp = np if isinstance(start, np.ndarray) else jnp
    T = start.shape[-1]
    start, stop = (_row_blocks(xp, x, block_q) for x in (start, stop))  # [..., row blocks, block_q]
    seeing = stop > start
    some = seeing.any(axis=-1)
    first = xp.where(some, xp.where(seeing, start, MOST).min(axis=-1) // block_k, 0)
    last = xp.where(some, _ceil_div(xp.where(seeing, stop, 0).max(axis=-1), block_k), 0)
    ignored = xp.zeros_like(seeing)
    if ignore_empty:
        ignored = ~seeing
    elif ignore_padding:
        filled = np.arange(seeing.shape[-2] * block_q).reshape(-1, block_q) >= T
        ignored = xp.broadcast_to(xp.asarray(filled), seeing.shape)
    free_first = _ceil_div(xp.where(ignored, 0, start).max(axis=-1), block_k)
    free_last = xp.where(ignored, MOST, stop).min(axis=-1) // block_k
    # A row that sees nothing and is not ignored has start >= stop, and so leaves this range empty.
    free = some & (free_first < free_last)
    free_first, free_last = xp.where(free, free_first, last), xp.where(free, free_last, last)
    return BlockBounds(*(x.astype(np.int32) for x in (first, last, free_first, free_last)))


def row_block_bounds(
    start: Int[Array | np.ndarray, "*B T"],
    stop: Int[Array | np.ndarray, "*B T"],
    *,
    block_q: int,
    block_k: int,
    num_keys: int,
) -> RowBlockBounds:
    """The row blocks that see any of each block of ``block_k`` keys: their hull, for gradients by keys and values.

    Compares each row with each key block: T * S / block_k booleans at once on the host, fused away on the device.

    Raises:
      ValueError: a block size below 1, or intervals that are not int32 of one shape ``[..., T]``.
    """
    _check(start, stop, block_q, block_k)
    xp = np if isinstance(start, np.ndarray) else jnp
    begin = np.arange(0, num_keys, block_k, dtype=np.int32).reshape((1,) * (start.ndim + 1) + (-1,))
    end = np.minimum(begin, num_keys - block_k).astype(np.int32) + np.int32(block_k)  # no overflow near 2**31
    start, stop = (_row_blocks(xp, x, block_q)[..., None] for x in (start, stop))
    sees: Any = ((start < end) & (stop > begin) & (stop > start)).any(axis=-2)  # [..., row blocks, key blocks]
    blocks = np.arange(sees.shape[-2], dtype=np.int32).reshape((-1, 1))
    blocks = xp.broadcast_to(xp.asarray(blocks), sees.shape)
    some = sees.any(axis=-2)
    first = xp.where(some, xp.where(sees, blocks, MOST).min(axis=-2, initial=MOST), 0)
    last = xp.where(some, xp.where(sees, blocks + 1, 0).max(axis=-2, initial=0), 0)
    return RowBlockBounds(first.astype(np.int32), last.astype(np.int32))


def _check(start, stop, block_q: int, block_k: int) -> None:
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks have 1 row and 1 key at least, got {block_q} rows and {block_k} keys")
    if start.shape != stop.shape or not start.shape:
        raise ValueError(f"start and stop of intervals have one shape [..., T], got {start.shape} and {stop.shape}")
    if start.dtype != np.int32 or stop.dtype != np.int32:
        raise ValueError(f"intervals are int32, got {start.dtype} and {stop.dtype}")


def _row_blocks(xp, x, block_q: int) -> Any:
    """``[..., T]`` to ``[..., ceil(T / block_q), block_q]``, filled up with zeros: empty rows."""
    x = xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block_q)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_q, block_q)


def _ceil_div(x, block: int):
    return x // block + (x % block > 0).astype(np.int32)  # x + block - 1 could overflow
