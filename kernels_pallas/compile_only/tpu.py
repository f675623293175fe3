"""Compile for a TPU that is not there, and read what its compiler says: memory, and estimated cycles an op.

`libtpu` from PyPI compiles on any Linux x86-64 machine. "Compiles for" is not "runs on": cycles are the compiler's
simulation of the final instructions with a model of memory copies. It follows loops and branches exactly where their
bounds are known in the kernel, and reads a scalar-prefetch operand as zeros: a kernel that is to be measured stores
its tables itself (see `kernels_pallas.interval_attention.pallas_tpu`).
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["CHIPS", "Chip", "compile_for", "run", "topology_devices"]


class Chip(NamedTuple):
    """One TPU generation: what to call it, and its floors.

    Attributes:
      topology: the smallest topology of it that `libtpu` knows.
      clock: cycles a second.
      flops: bfloat16 operations a cycle, all matrix units.
      bandwidth: bytes of main memory a second.
      memory: bytes of main memory that a program may take.
      link: bytes a second that one link to a neighbour carries one way; there are two links for each dimension of the
        topology, of which those at its ends lead round where a dimension is a multiple of ``ring``.
    """

    topology: str
    clock: float
    flops: int
    bandwidth: float
    memory: int
    link: float
    ring: int


GIB = 2**30
CHIPS = {
    "v4": Chip("v4:2x2x1", 1.05e9, 262_144, 1228e9, int(30.5 * GIB), 50e9, 4),
    "v5e": Chip("v5e:1x1", 1.50e9, 131_072, 819e9, int(15.75 * GIB), 50e9, 16),
    "v5e-4": Chip("v5e:2x2", 1.50e9, 131_072, 819e9, int(15.75 * GIB), 50e9, 16),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 262_144, 2765e9, int(95.73 * GIB), 100e9, 4),
    "v6e": Chip("v6e:1x1", 1.75e9, 524_288, 1640e9, int(31.24 * GIB), 100e9, 16),
    "tpu7x": Chip("tpu7x:2x2x1", 1.9e9, 524_288, 3690e9, int(189.48 * GIB), 100e9, 4),
}
"""Clocks and operations of v5e and v6e were checked against compiled matrix products; the others, bandwidths and links
are those of https://cloud.google.com/tpu/docs (a chip's interconnect over its ports and directions). Memory is what the
compiler says is there when it refuses a program."""


ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
"""Settings with which `libtpu` looks for no TPU (the last two keep it from complaining that there is none), and lets
other processes compile at the same time."""


def devices(chip: str):
    """The devices of a chip's topology, to compile for.

    Raises:
      ValueError: no such chip.
      RuntimeError: `libtpu` is not installed.
    """
    if chip not in CHIPS:
        raise ValueError(f"no chip {chip!r}; there are {', '.join(CHIPS)}")
    return topology_devices(CHIPS[chip].topology)


def topology_devices(topology: str):
    """The devices of a topology, "v5e:2x4" say, in the order in which JAX would list them.

    Raises:
      RuntimeError: `libtpu` is not installed, or knows no such topology.
    """
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compile_for(chip: str, function, args, *, donate=()):
    """``function(*args)`` compiled for one device of ``chip``; ``args`` are `jax.ShapeDtypeStruct`."""
    mesh = Mesh(np.array(devices(chip)[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def run(
    chip: str, build: str, kwargs: Mapping, *, cycles: bool = True, only: str | None = None, dump: str | None = None
) -> dict:
    """Compile in a process of its own, as some kernels end theirs; what cannot be compiled gives ``"error"``.

    Args:
      chip: a key of `CHIPS`.
      build: ``module:function``; the function gives what to compile and its arguments, and optionally a dict of
        arguments for `compile_for`.
      kwargs: for ``build``, as JSON can hold them.
      cycles: whether to estimate cycles.
      only: a part of the name of the one op to look at; some of XLA's own end the cycle model.
      dump: folder for the bundles of the kernels, to tune by.

    Returns:
      ``temp_bytes``, and ``cycles``: op name to estimated cycles; or ``error``.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The cycle model ends the process where an operand of a kernel starts out in VMEM, which this forbids.
        flags = [f"--xla_jf_dump_static_llo_profile_to={folder}", "--xla_msa_enable=false"] if cycles else []
        flags += [f"--xla_jf_dump_only_matching_hlo={only}"] if only else []
        flags += [f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true"] if dump else []
        environment = (
            os.environ
            | ALONE
            | {
                "JAX_PLATFORMS": "cpu",
                "LIBTPU_INIT_ARGS": " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]),
            }
        )
        request = json.dumps({"chip": chip, "build": build, "kwargs": dict(kwargs)})
        command = [sys.executable, "-m", "kernels_pallas.compile_only.tpu", request]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return {"error": _error(done)}
        found = json.loads(done.stdout.splitlines()[-1])
        if cycles:
            found["cycles"] = _cycles(Path(folder))
        return found


def _error(done) -> str:
    """The last lines of a compiler's complaint that say something."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("W0", "I0"))]
    return "\n".join(lines[-12:]) or f"exit status {done.returncode}"


def _cycles(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.iterdir()):
        match = re.search(r"estimated_cycles:\s*(\d+)", path.read_text(errors="replace"))
        if match:
            found[path.name] = int(match[1])
    return found


def _main(request: str) -> None:
    wanted = json.loads(request)
    module, _, name = wanted["build"].partition(":")
    function, args, *rest = getattr(importlib.import_module(module), name)(**wanted["kwargs"])
    compiled = compile_for(wanted["chip"], function, args, **(rest[0] if rest else {}))
    memory = compiled.memory_analysis()
    assert memory is not None, "libtpu tells a program's memory"
    print(json.dumps({"temp_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes}))


if __name__ == "__main__":
    _main(sys.argv[1])
