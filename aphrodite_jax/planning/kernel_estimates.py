"""The TPU compiler's own estimate of the attention kernels, each compiled alone for the requests of a plan."""

import dataclasses
from typing import Any

from aphrodite_jax.planning.targets import Target
from kernels_pallas.compile_only import tpu

__all__ = ["KernelEstimate", "estimate_attention"]

TILE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelEstimate:
    """One call of a kernel, for one layer on one device; ``error`` is the compiler's where it gives none.

    Attributes:
      cycles: of a simulation of the instructions with a model of copies, which takes memory for faster than it is.
      memory_seconds: the floor that memory sets.
    """

    name: str
    requests: str
    cycles: int | None
    seconds: float | None
    memory_seconds: float
    error: str | None = None


def estimate_attention(
    target: Target, *, requests: list[tuple[int, int]], page_size: int, heads: int, kv_heads: int, head_dim: int
) -> KernelEstimate:
    """Of one kind of requests, ``(keys, rows)`` each: all of one row, which are decoded, or all of whole tiles."""
    from kernels_pallas.benchmark.cases import Paged

    sizes: dict[str, Any] = dict(
        requests=requests, page_size=page_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    name = "paged_attention_decode" if requests[0][1] == 1 else "paged_attention_prefill"
    needed = Paged(about="", **{**sizes, "requests": tuple(requests)}).bytes()
    found = tpu.run(target.chip, "kernels_pallas.benchmark.tpu_ours:build_paged", sizes, only=f"{name}.1")
    cycles = next((n for op, n in found.get("cycles", {}).items() if op.startswith(name)), None)
    keys, rows = requests[0]
    return KernelEstimate(
        name=name,
        requests=f"{len(requests)} x {rows} of {keys} keys",
        cycles=cycles,
        seconds=None if cycles is None else cycles / tpu.CHIPS[target.chip].clock,
        memory_seconds=needed / target.bandwidth,
        error=found.get("error") or (None if cycles else "the compiler told no cycles"),
    )
