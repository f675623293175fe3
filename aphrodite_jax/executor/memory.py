"""Where a device's memory goes, and how many KV pages are left.

weights, encoder cache   what lies there always
code                     the machine code of all programs
temporary                what the hungriest program takes while it runs; they run one after the other
KV pages                 what is left
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from aphrodite_jax.config import EngineConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.model_programs import DeviceArrays, ModelPrograms, Representative, device_bytes
from aphrodite_jax.executor.programs import Programs

__all__ = ["MemoryBudget", "bytes_beside_pages", "code_of_all", "device_limit", "num_kv_pages", "plan_pages"]

CPU_KV_BYTES = 2**30
"""Most bytes that KV pages take on CPU without ``kv_cache_memory``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes by purpose, on each device. ``total`` is what may be used; None on CPU, where memory is the system's.

    ``code`` is that of the programs that were compiled.
    """

    weights: int
    kv_pages: int
    encoder_cache: int
    forward: int
    encode: int
    others: int
    code: int
    total: int | None

    @classmethod
    def of(cls, arrays: DeviceArrays, programs: Programs, total: int | None) -> "MemoryBudget":
        """Of arrays, or of their shapes, and of programs that were compiled."""
        return cls(
            weights=device_bytes(arrays.params),
            kv_pages=device_bytes(arrays.kv_caches),
            encoder_cache=device_bytes(arrays.encoder_cache),
            forward=programs.largest_temp_bytes("forward"),
            encode=programs.largest_temp_bytes("encode"),
            others=programs.largest_temp_bytes("decode", "sample", "sample_greedy", "store", "prompt_logprobs"),
            code=programs.code_bytes(),
            total=total,
        )

    def beside_pages(self, *, code: int) -> int:
        """Bytes of all but the pages, with ``code`` of programs, which run one after the other."""
        return self.weights + self.encoder_cache + code + max(self.forward, self.encode, self.others)

    def __str__(self) -> str:
        lines = {
            "weights": self.weights,
            "KV pages": self.kv_pages,
            "encoder cache": self.encoder_cache,
            "largest forward program": self.forward,
            "largest encode program": self.encode,
            "largest other program": self.others,
            "code of programs": self.code,
        }
        rows = [f"{name:<24}{_mib(size):>12}" for name, size in lines.items()]
        rows.append(f"{'sum':<24}{_mib(sum(lines.values())):>12}")
        if self.total is not None:
            rows.append(f"{'may be used':<24}{_mib(self.total):>12}")
        return "\n".join(rows)


def plan_pages(made: ModelPrograms, engine_config: EngineConfig, limit: int | None, programs: Programs) -> int:
    """How many pages a device has room for.

    Where that hangs on what programs take, the largest of each kind is compiled for a cache of one page.

    Args:
      limit: bytes that may be used on a device; None on CPU.
      programs: compiles them.

    Raises:
      ConfigError: one request at its full length would not fit.
    """
    used = 0
    if limit is not None and engine_config.kv_cache_memory is None:
        used = bytes_beside_pages(made, programs)
    return num_kv_pages(
        page_bytes=device_bytes(made.arrays(1).kv_caches),
        page_size=made.page_size,
        max_num_seqs=engine_config.max_num_seqs,
        context_length=made.context_length,
        requested=engine_config.kv_cache_memory,
        limit=limit,
        used=used,
    )


def bytes_beside_pages(made: ModelPrograms, programs: Programs) -> int:
    """Bytes of a device that all but the pages take; the largest program of each kind is compiled for it."""
    arrays = made.arrays(1)
    largest = made.representatives(arrays)
    programs.compile([x.job for x in largest], show_progress=False)
    budget = MemoryBudget.of(arrays, programs, None)
    return budget.beside_pages(code=code_of_all(largest, programs))


def code_of_all(largest: Sequence[Representative], programs: Programs) -> int:
    """Bytes of machine code of all programs, at most: each is taken to be as long as the largest of its kind."""
    return sum(x.count * programs.get(x.job).code_bytes for x in largest)


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
