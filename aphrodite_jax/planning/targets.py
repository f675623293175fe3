"""Devices to plan for: slices of TPUs, and single GPUs, as their compilers know them without one being there."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
from jax.experimental import topologies

from aphrodite_jax.errors import ConfigError
from kernels_pallas.compile_only import gpu, tpu

__all__ = ["Target", "find_target", "larger_topologies"]

SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
}
"""Topologies by their dimensions, ascending, as Google sells them."""
DIMENSIONS = {"v5e": 2, "v6e": 2, "v4": 3, "v5p": 3, "tpu7x": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices, and what one of them can do at most.

    Attributes:
      name: as asked for, "v5e:2x4" say.
      chip: the kind, a key of the tables of `kernels_pallas.compile_only`.
      platform: "tpu" or "gpu".
      devices: in JAX's order.
      shape: of the topology, in chips.
      memory: bytes of a device.
      bandwidth: bytes of its memory a second.
      flops: bfloat16 operations a second of its matrix units; None where no figure is at hand.
      egress: bytes a second that a device at a corner of the topology sends to its neighbours, all links together; None
        for one device.
    """

    name: str
    chip: str
    platform: str
    devices: tuple[Any, ...]
    shape: tuple[int, ...]
    memory: int
    bandwidth: float
    flops: float
    egress: float | None


def find_target(name: str) -> Target:
    """The devices called ``name``: a TPU topology, "v5e:2x4" or "v5p:2x2x2" say, or a GPU, "h100" say.

    Raises:
      ConfigError: there is no such topology or card, or its compiler is not installed.
    """
    if name in gpu.CARDS:
        return _gpu(name)
    chip, _, shape = name.partition(":")
    if chip not in DIMENSIONS:
        raise ConfigError(
            f"no topology {name!r}: it is a TPU with the shape of a slice, of {', '.join(DIMENSIONS)}, such as "
            f"'v5e:2x4' or 'v5p:2x2x2', or a GPU, {', '.join(gpu.CARDS)}"
        )
    dimensions = DIMENSIONS[chip]
    shape = shape or SHAPES[dimensions][0]
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", shape):
        raise ConfigError(
            f"no topology {name!r}: a slice of {chip} has {dimensions} dimensions, of {', '.join(SHAPES[dimensions])}"
        )
    sizes = tuple(map(int, shape.split("x")))
    try:
        devices = tuple(tpu.topology_devices(f"{chip}:{shape}"))
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ConfigError(_refused(name, error)) from error
    about, cores = tpu.CHIPS[chip], len(devices) // math.prod(sizes)
    return Target(
        name=name,
        chip=chip,
        platform="tpu",
        devices=devices,
        shape=sizes,
        memory=about.memory // cores,
        bandwidth=about.bandwidth / cores,
        flops=about.flops * about.clock / cores,
        egress=_egress(about, sizes) / cores if math.prod(sizes) > 1 else None,
    )


def larger_topologies(target: Target) -> tuple[tuple[str, int], ...]:
    """Slices of the same chip that have more devices, ascending, with how many."""
    if target.platform != "tpu":
        return ()
    cores = len(target.devices) // math.prod(target.shape)
    sizes = [(shape, math.prod(map(int, shape.split("x")))) for shape in SHAPES[DIMENSIONS[target.chip]]]
    return tuple((f"{target.chip}:{shape}", n * cores) for shape, n in sizes if n > math.prod(target.shape))


def _egress(chip: tpu.Chip, shape: tuple[int, ...]) -> float:
    """Of a corner: one link for each dimension, two where a dimension is a ring."""
    return chip.link * sum(2 if n % chip.ring == 0 else 1 for n in shape if n > 1)


def _gpu(name: str) -> Target:
    missing = gpu.missing()
    if missing is not None:
        raise ConfigError(f"topology {name!r} {missing}")
    card = gpu.CARDS[name]
    topology = topologies.get_topology_desc(platform="cuda", target_config=card.target_config(), topology="1x1x1")
    return Target(
        name=name,
        chip=name,
        platform="gpu",
        devices=tuple(topology.devices),
        shape=(1,),
        memory=card.memory,
        bandwidth=card.bandwidth,
        flops=card.flops,
        egress=None,
    )


def _refused(name: str, error: Exception) -> str:
    said = str(error).splitlines()[0]
    if not _has_libtpu():
        return f"topology {name!r} needs the TPU compiler: pip install 'aphrodite-jax[compile]' ({said})"
    return f"no topology {name!r}: {said}; slices are {', '.join(SHAPES[DIMENSIONS[name.partition(':')[0]]])}"


@functools.cache
def _has_libtpu() -> bool:
    from importlib.util import find_spec

    return find_spec("libtpu") is not None
