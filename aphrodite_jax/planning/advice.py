"""What would fit where a plan does not: arithmetic from what was measured, nothing is compiled for it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.sharding import check_heads
from aphrodite_jax.planning.shapes import weight_bytes
from aphrodite_jax.planning.targets import Target, larger_topologies
from kernels_pallas.pages import page_width

__all__ = ["Needs", "remedies"]

LEAST_LENGTH = 1024
"""A shorter context is not proposed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What a plan is made of.

    Attributes:
      model: with shapes for parameters, on no devices.
      devices: that hold one copy.
      kv_shapes: key heads and their width of each layer.
      encoder_cache: its rows and their width; each device has its columns, or all where the devices do not divide them.
      programs: bytes of code and temporary memory; None where none was compiled.
      limit: bytes of a device that may be used.
    """

    model: Any
    model_config: ModelConfig
    encoder_parallel: str
    devices: int
    context_length: int
    page_size: int
    kv_shapes: tuple[tuple[int, int], ...]
    platform: str
    itemsize: int
    encoder_cache: tuple[int, int]
    programs: int | None
    limit: int

    def bytes(self, *, devices: int, context_length: int, itemsize: int) -> int:
        """Of one device, with room for one request of ``context_length``."""
        factor = itemsize / self.itemsize
        pages = -(-context_length // self.page_size)
        per_token = sum(
            max(heads, devices) // devices * page_width(head_dim, self.platform) for heads, head_dim in self.kv_shapes
        )
        rows, width = self.encoder_cache
        columns = width if width % devices else width // devices
        return int(
            factor * weight_bytes(self.model, devices, self.encoder_parallel)
            + rows * columns * itemsize
            + (self.programs or 0)
            + per_token * itemsize * pages * self.page_size
        )

    def divides(self, devices: int) -> bool:
        """Whether the model can be divided so."""
        try:
            for heads, _ in self.kv_shapes:
                check_heads(self.model_config.hf_text_config.num_attention_heads, heads, devices)
        except ConfigError:
            return False
        return True


def remedies(needs: Needs, target: Target, dtype: str) -> tuple[str, ...]:
    """What would fit, the least change first; with what it takes of a device."""
    found = list(_remedies(needs, target, dtype))
    if not found:
        return ("nothing of this kind: neither more devices, a shorter context nor bfloat16 would do",)
    if needs.programs is None:
        found.append("programs are not counted in these figures, as none could be compiled")
    return tuple(found)


def _remedies(needs: Needs, target: Target, dtype: str) -> Iterator[str]:
    asked = dict(devices=needs.devices, context_length=needs.context_length, itemsize=needs.itemsize)

    def told(text: str, **changed: int) -> Iterator[str]:
        needed = needs.bytes(**(asked | changed))
        if needed <= needs.limit:
            yield f"{text}: {needed / 2**30:.2f} of {needs.limit / 2**30:.2f} GiB"

    here = [n for n in range(needs.devices + 1, len(target.devices) + 1) if len(target.devices) % n == 0]
    for devices in filter(needs.divides, here):
        one = list(told(f"--tensor-parallel-size {devices}", devices=devices))
        yield from one
        if one:
            break
    for name, devices in larger_topologies(target):
        if needs.divides(devices) and devices > needs.devices:
            one = list(told(f"--topology {name} --tensor-parallel-size {devices}", devices=devices))
            yield from one
            if one:
                break
    length = needs.context_length // 2
    while length >= LEAST_LENGTH:
        one = list(told(f"--max-model-len {length}", context_length=length))
        yield from one
        if one:
            break
        length //= 2
    if dtype == "float32":
        yield from told("--dtype bfloat16", itemsize=2)
