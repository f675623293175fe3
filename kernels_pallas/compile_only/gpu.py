"""Compiles for NVIDIA GPUs on a machine that has none, and tells what the machine code needs.

JAX's compile-only client goes all the way to machine code. It needs the CUDA plugin of jax's own version and NVIDIA's
assembler, no driver and no toolkit:

    Python 3.11, jax 0.10    pip install --no-deps jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12
    Python 3.12, jax 0.12    pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX nvidia-cuda-nvcc
                             nvidia-nvvm nvidia-cuda-crt

`compile_for` works in this process, which must run with ``JAX_PLATFORMS=cpu``; `run` starts one for a request, since
some failures of the compiler abort Python. As a program it reads a request from standard input and prints one line of
JSON:

    echo '{"build": "kernels_pallas.compile_only.gpu:dense_forward", "target": "l4", "arguments": {"head_dim": 64}}' |
        JAX_PLATFORMS=cpu python -m kernels_pallas.compile_only.gpu

Found this way: shared memory over the card's limit, spilled registers, types that a card lacks. Not found: races, wrong
numbers, speed.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

__all__ = [
    "CARDS",
    "Card",
    "Compiled",
    "Kernel",
    "compile_for",
    "dense_backward",
    "dense_forward",
    "dense_training",
    "missing",
    "run",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What the compiler asks about a card; memory in bytes, shared memory a block (opt-in) and a multiprocessor.

    ``flops`` are bfloat16 operations a second of its tensor cores, without sparsity, from NVIDIA's data sheets.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    shared_memory_block: int
    shared_memory_core: int
    threads_core: int
    memory: int
    bandwidth: int
    l2_cache: int
    clock_ghz: float
    flops: float

    def target_config(self) -> str:
        """XLA's ``GpuTargetConfigProto`` as text."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_core} shared_memory_per_block_optin: {self.shared_memory_block}
  threads_per_core_limit: {self.threads_core} core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{self.name}"
"""


CARDS = {
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        shared_memory_block=166912,
        shared_memory_core=167936,
        threads_core=2048,
        memory=85_899_345_920,
        bandwidth=2_039_000_000_000,
        l2_cache=41_943_040,
        clock_ghz=1.41,
        flops=312e12,
    ),
    "l4": Card(
        name="NVIDIA L4",
        capability=(8, 9),
        cores=58,
        shared_memory_block=101376,
        shared_memory_core=102400,
        threads_core=1536,
        memory=24_152_899_584,
        bandwidth=300_000_000_000,
        l2_cache=50_331_648,
        clock_ghz=2.04,
        flops=121e12,
    ),
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        shared_memory_block=232448,
        shared_memory_core=233472,
        threads_core=2048,
        memory=84_929_347_584,
        bandwidth=3_352_320_000_000,
        l2_cache=52_428_800,
        clock_ghz=1.98,
        flops=989e12,
    ),
}
"""NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel's needs: registers a thread, bytes spilled (stores and loads), bytes of shared memory a block."""

    name: str
    registers: int
    spill_bytes: int
    shared_memory_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled function's kernels, and the bytes of temporary device memory it takes."""

    kernels: tuple[Kernel, ...]
    temp_bytes: int

    @property
    def registers(self) -> int:
        """Of the kernel that needs most."""
        return max(kernel.registers for kernel in self.kernels)

    @property
    def spill_bytes(self) -> int:
        """Of all kernels."""
        return sum(kernel.spill_bytes for kernel in self.kernels)

    @property
    def shared_memory_bytes(self) -> int:
        """Of the kernel that needs most."""
        return max(kernel.shared_memory_bytes for kernel in self.kernels)


def missing() -> str | None:
    """What to install before anything can be compiled here, or None."""
    cuda = next((c for c in (12, 13) if importlib.util.find_spec(f"jax_cuda{c}_plugin")), None)
    if cuda is None or _ptxas() is None:
        version = jax.__version__
        return (
            f"needs jax's CUDA plugin and NVIDIA's assembler: pip install --no-deps jax-cuda12-plugin=={version} "
            f"jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12 (or, from jax 0.12: jax-cuda13-plugin=={version} "
            f"jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt)"
        )
    return None


def compile_for(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct], target: str) -> Compiled:
    """Compiles ``function(*arguments)`` for a card of `CARDS`, in this process.

    Raises:
      KeyError: no card of this name.
      jax.errors.JaxRuntimeError: the compiler refuses, for shared memory over the card's limit and the like.
    """
    card = CARDS[target]
    topology = topologies.get_topology_desc(platform="cuda", target_config=card.target_config(), topology="1x1x1")
    device = topology.devices[0]
    on_card = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_card) for x in arguments]
    with tempfile.TemporaryDirectory() as dump:
        options: dict[str, Any] = {"xla_dump_to": dump}
        if jax.__version_info__ >= (0, 12):
            options["xla_dump_emitter_re"] = "ptx"
        with jax.default_device(device):
            compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
        memory = compiled.memory_analysis()
        assert memory is not None, "the CUDA compiler tells a program's memory"
        return Compiled(kernels=tuple(_kernels(Path(dump), card)), temp_bytes=memory.temp_size_in_bytes)


def _kernels(dump: Path, card: Card):
    """Registers and spills from the assembler; shared memory, which is set at launch, from XLA's list of kernels."""
    launches = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    shared = {name: int(size) for name, size in re.findall(r"([\w.]+) grid: .*?shared_memory: (\d+) bytes", launches)}
    for path in sorted(dump.glob("*.ptx")):
        text = path.read_text()
        architecture = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        if architecture is None:  # a module without kernels
            continue
        command = [_ptxas(), "-v", f"-arch={architecture[1]}", str(path), "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for entry in report.split("Compiling entry function ")[1:]:
            name = entry.split("'")[1]
            spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            registers = re.search(r"Used (\d+) registers", entry)
            fixed = re.search(r"(\d+) bytes smem", entry)
            assert spilled is not None, f"ptxas tells spills, not {entry!r}"
            assert registers is not None, f"ptxas tells registers, not {entry!r}"
            yield Kernel(
                name=name,
                registers=int(registers[1]),
                spill_bytes=int(spilled[1]) + int(spilled[2]),
                shared_memory_bytes=shared.get(name, 0) or (int(fixed[1]) if fixed else 0),
            )


def _ptxas() -> str | None:
    """NVIDIA's assembler, of the wheel or on the path."""
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        found = next(Path(folder).glob("*/bin/ptxas"), None)
        if found:
            return str(found)
    return shutil.which("ptxas")


def run(request: Mapping[str, Any], *, timeout: float = 300) -> dict[str, Any]:
    """Compiles in a process of its own.

    ``request`` holds ``build``, the "module:function" that makes a function and its arguments, ``arguments`` for that
    (optional), and ``target``. What comes back holds `Compiled`'s fields, or "error" with what the process said last.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    worker = subprocess.run(
        [sys.executable, "-m", "kernels_pallas.compile_only.gpu"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if worker.returncode:
        return {"error": f"exit status {worker.returncode}: {worker.stderr[-2000:].strip()}"}
    return json.loads(worker.stdout.splitlines()[-1])


def dense_forward(
    *,
    num_rows: int = 4096,
    num_keys: int | None = None,
    num_heads: int = 16,
    num_kv_heads: int = 16,
    head_dim: int = 64,
    batch: int = 1,
    dtype: str = "bfloat16",
    soft_cap: float | None = None,
    blocks: Sequence[int] | None = None,
):
    """Dense attention's forward kernel and its arguments; ``blocks`` (`Blocks` as a list) in place of the table's."""
    from kernels_pallas.interval_attention import pallas_gpu

    def function(*operands):
        return pallas_gpu.forward(
            *operands, scale=head_dim**-0.5, soft_cap=soft_cap, interpret=False, blocks=_blocks(blocks)
        )

    shapes = (batch, num_rows, num_heads), (batch, num_keys or num_rows, num_kv_heads)
    return function, _operands(*shapes, head_dim, dtype)


def dense_backward(
    *,
    num_rows: int = 4096,
    num_keys: int | None = None,
    num_heads: int = 16,
    num_kv_heads: int = 16,
    head_dim: int = 64,
    batch: int = 1,
    dtype: str = "bfloat16",
    soft_cap: float | None = None,
    d_query: Sequence[int] | None = None,
    d_key: Sequence[int] | None = None,
):
    """Dense attention's backward kernels and their arguments, as `dense_forward`."""
    from kernels_pallas.interval_attention import pallas_gpu

    def function(*operands):
        return pallas_gpu.backward(
            *operands,
            scale=head_dim**-0.5,
            soft_cap=soft_cap,
            interpret=False,
            d_query=_blocks(d_query),
            d_key=_blocks(d_key),
        )

    rows = batch, num_rows, num_heads
    operands = _operands(rows, (batch, num_keys or num_rows, num_kv_heads), head_dim, dtype)
    row_values = jax.ShapeDtypeStruct(rows, jnp.float32)
    return function, (*operands, row_values, row_values, operands[0])


def dense_training(**arguments):
    """Dense attention's forward and backward kernels, each on operands of its own; arguments of `dense_forward`."""
    forward, _ = dense_forward(**arguments)
    backward, operands = dense_backward(**{name: x for name, x in arguments.items() if name != "blocks"})
    return lambda *operands: (forward(*operands[:5]), backward(*operands)), operands


def _blocks(sizes: Sequence[int] | None):
    from kernels_pallas.interval_attention.pallas_gpu import Blocks

    return None if sizes is None else Blocks(*sizes)


def _operands(rows, keys, head_dim: int, dtype: str):
    q, k = (jax.ShapeDtypeStruct((*shape, head_dim), jnp.dtype(dtype)) for shape in (rows, keys))
    interval = jax.ShapeDtypeStruct(rows[:2], jnp.int32)
    return q, k, k, interval, interval


def main() -> None:
    """Compiles the request on standard input."""
    request = json.load(sys.stdin)
    module, _, name = request["build"].partition(":")
    function, arguments = getattr(importlib.import_module(module), name)(**request.get("arguments", {}))
    print(json.dumps(dataclasses.asdict(compile_for(function, arguments, request["target"]))))


if __name__ == "__main__":
    main()
