"""Device programs: compiled ahead of time for declared shapes, and counted when they are not.

A mesh of devices that are not there (`jax.experimental.topologies`) has its programs compiled like any other; they can
be looked at and saved, and not run.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from aphrodite_jax.errors import RecompilationError
from aphrodite_jax.executor.saved_programs import SavedProgram, SavedPrograms
from kernels_pallas.platform import made_for

__all__ = ["CompileJob", "CompiledProgram", "Programs"]

TPU_OPTIONS = {"xla_tpu_enable_deduplicated_calls": "true"}
"""Layers that are alike share their machine code, which lies in the device's memory as long as a program is held ready:
a third or less of it is left, and it takes no longer to compile. The compiler does so by itself in some programs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """One program in one bucket.

    Attributes:
      call: takes the arguments of its job.
      temp_bytes: device memory while it runs, arguments and results not counted.
      seconds: that it took to compile, or to read.
      code_bytes: device memory of its machine code, while it is held ready.
    """

    name: str
    key: Hashable
    call: Callable
    temp_bytes: int
    seconds: float
    code_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileJob:
    """A program to compile: ``fn`` for ``args`` (arrays or their shapes), those named by ``donate`` given away."""

    name: str
    key: Hashable
    fn: Callable
    args: tuple
    donate: tuple[int, ...] = ()


class Programs:
    """All compiled programs by ``(name, key)``.

    After `seal`, a program that was not compiled before raises `RecompilationError` ("raise") or is compiled
    with a warning and counted in ``late_compiles`` ("warn"). With a mesh, programs are for all of its devices. With
    ``saved``, those that are there are read, and the others are put there.
    """

    def __init__(self, on_recompile: str, mesh: Mesh | None = None, saved: SavedPrograms | None = None):
        self._on_recompile = on_recompile
        self._mesh = mesh
        self._saved = saved
        self._compiled: dict[tuple[str, Hashable], CompiledProgram] = {}
        self._sealed = False
        self.late_compiles = 0
        self._knows_options = True

    def compile(self, jobs: Sequence[CompileJob], *, show_progress: bool) -> None:
        """Trace one after another and compile in parallel; programs that are there are left."""
        jobs = [job for job in jobs if (job.name, job.key) not in self._compiled and not self._read(job)]
        bar = tqdm(total=len(jobs), desc="compiling programs", unit="program", disable=not show_progress)
        with bar, ThreadPoolExecutor(max_workers=4) as pool:
            futures = [pool.submit(self._compile_lowered, job, self.lower(job)) for job in jobs]
            for job, future in zip(jobs, futures, strict=True):
                self._keep(job, future.result())
                bar.update()

    def seal(self) -> None:
        """Declare that all programs are compiled."""
        self._sealed = True

    def run(self, job: CompileJob) -> Any:
        """Run a program on its arguments; arrays at donated positions must not be used afterwards."""
        if (job.name, job.key) not in self._compiled and not self._read(job):
            if self._sealed:
                self._report_late(job)
            self._keep(job, self._compile_lowered(job, self.lower(job)))
        return self._compiled[job.name, job.key].call(*job.args)

    def has(self, job: CompileJob) -> bool:
        """Whether the program of a job was compiled."""
        return (job.name, job.key) in self._compiled

    def get(self, job: CompileJob) -> CompiledProgram:
        """The program of a job that was compiled."""
        return self._compiled[job.name, job.key]

    def table(self) -> tuple[CompiledProgram, ...]:
        """Every compiled program, by name."""
        return tuple(sorted(self._compiled.values(), key=lambda program: (program.name, str(program.key))))

    def describe(self) -> str:
        """A table: program, bucket, seconds to compile, temporary memory, machine code."""
        rows = [("program", "bucket", "seconds", "temporary", "code")]
        rows += [
            (
                x.name,
                _short(x.key),
                f"{x.seconds:.2f}",
                *(f"{n / 2**20:,.1f} MiB" for n in (x.temp_bytes, x.code_bytes)),
            )
            for x in self.table()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {key:<{widths[1]}}  {seconds:>{widths[2]}}  {temp:>{widths[3]}}  {code:>{widths[4]}}"
            for name, key, seconds, temp, code in rows
        ]
        return "\n".join(lines)

    def largest_temp_bytes(self, *names: str) -> int:
        """Device memory of the hungriest program with one of these names, its arguments and results not counted."""
        return max((program.temp_bytes for program in self._compiled.values() if program.name in names), default=0)

    def code_bytes(self) -> int:
        """Device memory of the machine code of all programs."""
        return sum(program.code_bytes for program in self._compiled.values())

    def _read(self, job: CompileJob) -> bool:
        """Take a program from those that were saved; whether it was there."""
        if self._saved is None:
            return False
        begin = time.perf_counter()
        found = self._saved.read(job.name, job.key, job.args, job.donate)
        if found is not None:
            self._compiled[job.name, job.key] = CompiledProgram(
                name=job.name,
                key=job.key,
                call=found.call,
                temp_bytes=found.temp_bytes,
                code_bytes=found.code_bytes,
                seconds=time.perf_counter() - begin,
            )
        return found is not None

    def _keep(self, job: CompileJob, program: CompiledProgram) -> None:
        self._compiled[job.name, job.key] = program
        if self._saved is not None:
            saved = SavedProgram(call=program.call, temp_bytes=program.temp_bytes, code_bytes=program.code_bytes)
            self._saved.write(job.name, job.key, job.args, job.donate, saved)

    def lower(self, job: CompileJob) -> Any:
        """A program traced, as `jax.stages.Lowered`."""
        jitted = jax.jit(job.fn, donate_argnums=job.donate)
        if self._mesh is None:
            return jitted.lower(*job.args)
        with jax.set_mesh(self._mesh), made_for(self._mesh.devices.flat[0]):
            return jitted.lower(*job.args)

    def _compile_lowered(self, job: CompileJob, lowered: Any) -> CompiledProgram:
        device = jax.devices()[0] if self._mesh is None else self._mesh.devices.flat[0]
        if device.platform == "tpu" and self._knows_options:
            try:
                return _compile(job, lowered, TPU_OPTIONS)
            except jax.errors.JaxRuntimeError as error:
                if "No such compile option" not in str(error):
                    raise
                self._knows_options = False  # another version of the compiler: what it does without them is right too
        return _compile(job, lowered, None)

    def _report_late(self, job: CompileJob) -> None:
        self.late_compiles += 1
        message = f"program {job.name!r} compiles after warm-up, for {job.key}"
        if self._on_recompile == "raise":
            raise RecompilationError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _short(key: Hashable) -> str:
    text = str(key)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _compile(job: CompileJob, lowered: Any, options: dict[str, str] | None) -> CompiledProgram:
    begin = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    analysis = compiled.memory_analysis()  # None on backends without the analysis
    return CompiledProgram(
        name=job.name,
        key=job.key,
        call=compiled,
        temp_bytes=0 if analysis is None else analysis.temp_size_in_bytes,
        code_bytes=0 if analysis is None else analysis.generated_code_size_in_bytes,
        seconds=time.perf_counter() - begin,
    )
