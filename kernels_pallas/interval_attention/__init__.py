"""Dense attention with row-interval masks: vision towers, prefill without a cache, training."""

from kernels_pallas.interval_attention.api import interval_attention

__all__ = ["interval_attention"]
