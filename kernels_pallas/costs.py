"""Operations and bytes of one call of a kernel, as far as shapes tell: what the compiler counts for it.

A kernel is opaque to XLA, which would count all pages of a cache as read. How long requests are is not known when a
program is compiled: they are taken to fill their block tables, or all of the cache where that is less, and rows of
prompts to see half of that. What a mask hides is not known either, and is counted.
"""

import math

import jax
from jax.experimental import pallas as pl

__all__ = ["dense_attention", "kv_write", "paged_decode", "paged_prefill"]


def dense_attention(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> pl.CostEstimate:
    """Of `kernels_pallas.interval_attention`, for queries ``[B, T, N, H]`` and keys ``[B, S, K, H]``."""
    B, T, N, H = q.shape
    scores = B * N * T * k.shape[1]
    return _estimate(scores, H, 2 * _bytes(q) + 2 * _bytes(k))


def paged_decode(
    q: jax.ShapeDtypeStruct, pages: jax.ShapeDtypeStruct, table_width: int, keys: float | None = None
) -> pl.CostEstimate:
    """Of decode rows ``q [D, N, H]`` over pages ``[P, K, page_size, W]``, with ``table_width`` pages a request.

    ``keys`` is how many each row sees, where that is known.
    """
    D, N, H = q.shape
    P, K, page_size, W = pages.shape
    seen = min(D * table_width, P) * page_size / D if keys is None else keys
    read = D * seen * K * W * pages.dtype.itemsize
    return _estimate(D * N * seen, H, 2 * _bytes(q) + read)


def paged_prefill(
    q: jax.ShapeDtypeStruct, pages: jax.ShapeDtypeStruct, num_requests: int, table_width: int, keys: float | None = None
) -> pl.CostEstimate:
    """Of rows of prompts ``q [T, N, H]``, as `paged_decode`; a request's pages are read once.

    ``keys`` is how many a row sees on average, where that is known; its request has twice as many.
    """
    T, N, H = q.shape
    P, K, page_size, W = pages.shape
    seen = min(num_requests * table_width, P) * page_size / num_requests / 2 if keys is None else keys
    read = num_requests * 2 * seen * K * W * pages.dtype.itemsize
    return _estimate(T * N * seen, H, 2 * _bytes(q) + read)


def kv_write(pages: jax.ShapeDtypeStruct, num_rows: int) -> pl.CostEstimate:
    """Of `kernels_pallas.kv_write` on TPU: new rows, in float32, and their places in the pages, read and written."""
    _, K, _, W = pages.shape
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=num_rows * K * W * (4 + 2 * pages.dtype.itemsize))


def _estimate(scores: float, head_dim: int, bytes_accessed: float) -> pl.CostEstimate:
    """Two products and one exponential for each score."""
    return pl.CostEstimate(
        flops=int(4 * scores * head_dim), transcendentals=int(scores), bytes_accessed=int(bytes_accessed)
    )


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
