"""Attention with row-interval masks, dense and paged. Imports jax and numpy alone."""

from kernels_pallas.interval_attention import interval_attention
from kernels_pallas.intervals import RowIntervals
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_attention import paged_attention

__all__ = ["RowIntervals", "interval_attention", "kv_write", "paged_attention"]
