"""Attention over pages of keys and values: ragged rows of many requests, with row-interval masks."""

from kernels_pallas.paged_attention.api import check_block_tables, paged_attention

__all__ = ["check_block_tables", "paged_attention"]
