"""Where a device's memory goes, and how many KV pages are left."""

import dataclasses
import math
from typing import Any

from aphrodite_jax.errors import ConfigError
from kernels_pallas.pages import pages_shape

__all__ = ["MemoryBudget", "kv_bytes_per_page", "num_kv_pages"]

CPU_KV_BYTES = 2**30
"""Most bytes that KV pages take on CPU without ``kv_cache_memory``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes by purpose, on each device. ``total`` is what may be used; None on CPU, where memory is the system's."""

    weights: int
    kv_pages: int
    encoder_cache: int
    forward: int
    encode: int
    total: int | None

    def __str__(self) -> str:
        lines = {
            "weights": self.weights,
            "KV pages": self.kv_pages,
            "encoder cache": self.encoder_cache,
            "largest forward program": self.forward,
            "largest encode program": self.encode,
        }
        rows = [f"{name:<24}{_mib(size):>12}" for name, size in lines.items()]
        rows.append(f"{'sum':<24}{_mib(sum(lines.values())):>12}")
        if self.total is not None:
            rows.append(f"{'may be used':<24}{_mib(self.total):>12}")
        return "\n".join(rows)


def kv_bytes_per_page(shapes, page_size: int, itemsize: int, platform: str) -> int:
    """Bytes of one page in all layers, for ``(num_kv_heads, head_dim)`` of each layer; a page is wider on TPU."""
    return sum(math.prod(pages_shape(1, heads, page_size, dim, platform)) for heads, dim in shapes) * itemsize


def device_limit(device: Any, fraction: float) -> int | None:
    """Bytes that may be used on ``device``; None on CPU."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ConfigError(f"{device} does not tell its memory; set kv_cache_memory")
    return int(stats["bytes_limit"] * fraction)


def num_kv_pages(
    *,
    page_bytes: int,
    page_size: int,
    max_num_seqs: int,
    context_length: int,
    requested: int | None,
    limit: int | None,
    used: int,
) -> int:
    """Pages of the KV cache.

    Args:
      requested: ``kv_cache_memory`` in bytes; None takes what is left of ``limit`` after ``used``, or on CPU (no
        limit) enough for ``max_num_seqs`` full requests, at most 1 GiB.

    Raises:
      ConfigError: one request of ``context_length`` tokens would not fit.
    """
    pages_per_request = -(-context_length // page_size)
    if requested is not None:
        pages = requested // page_bytes
    elif limit is not None:
        pages = (limit - used) // page_bytes
    else:
        pages = min(max_num_seqs * pages_per_request, CPU_KV_BYTES // page_bytes)
    if pages < pages_per_request:
        raise ConfigError(
            f"KV pages hold {max(pages, 0) * page_size} tokens, one request of max_model_len {context_length} needs "
            f"{_mib(pages_per_request * page_bytes)}: lower max_model_len or raise kv_cache_memory"
        )
    return pages


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
