"""Device programs: compiled ahead of time for declared shapes, and counted when they are not."""

import contextlib
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

__all__ = ["CompileJob", "CompiledProgram", "Programs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """One program in one bucket: ``temp_bytes`` of device memory while it runs, seconds that it took to compile."""

    name: str
    key: Hashable
    call: Callable
    temp_bytes: int
    seconds: float


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
    with a warning and counted in ``late_compiles`` ("warn"). With a mesh, programs are for all of its devices.
    """

    def __init__(self, on_recompile: str, mesh: Mesh | None = None):
        self._on_recompile = on_recompile
        self._mesh = mesh
        self._compiled: dict[tuple[str, Hashable], CompiledProgram] = {}
        self._sealed = False
        self.late_compiles = 0

    def compile(self, jobs: Sequence[CompileJob], *, show_progress: bool) -> None:
        """Trace one after another and compile in parallel; programs that are there are left."""
        jobs = [job for job in jobs if (job.name, job.key) not in self._compiled]
        bar = tqdm(total=len(jobs), desc="compiling programs", unit="program", disable=not show_progress)
        with bar, ThreadPoolExecutor(max_workers=4) as pool:
            futures = [pool.submit(_compile, job, self._lower(job)) for job in jobs]
            for future in futures:
                program = future.result()
                self._compiled[program.name, program.key] = program
                bar.update()

    def seal(self) -> None:
        """Declare that all programs are compiled."""
        self._sealed = True

    def run(self, job: CompileJob) -> Any:
        """Run a program on its arguments; arrays at donated positions must not be used afterwards."""
        program = self._compiled.get((job.name, job.key))
        if program is None:
            if self._sealed:
                self._report_late(job)
            program = self._compiled[job.name, job.key] = _compile(job, self._lower(job))
        return program.call(*job.args)

    def table(self) -> tuple[CompiledProgram, ...]:
        """Every compiled program, by name."""
        return tuple(sorted(self._compiled.values(), key=lambda program: (program.name, str(program.key))))

    def describe(self) -> str:
        """A table: program, bucket, seconds to compile, bytes of temporary memory."""
        rows = [("program", "bucket", "seconds", "temporary")]
        rows += [(x.name, _short(x.key), f"{x.seconds:.2f}", f"{x.temp_bytes / 2**20:,.1f} MiB") for x in self.table()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {key:<{widths[1]}}  {seconds:>{widths[2]}}  {size:>{widths[3]}}"
            for name, key, seconds, size in rows
        ]
        return "\n".join(lines)

    def largest_temp_bytes(self, name: str) -> int:
        """Device memory of the hungriest program called ``name``, its arguments and results not counted."""
        return max((program.temp_bytes for program in self._compiled.values() if program.name == name), default=0)

    def _lower(self, job: CompileJob) -> Any:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return jax.jit(job.fn, donate_argnums=job.donate).lower(*job.args)

    def _report_late(self, job: CompileJob) -> None:
        self.late_compiles += 1
        message = f"program {job.name!r} compiles after warm-up, for {job.key}"
        if self._on_recompile == "raise":
            raise RecompilationError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _short(key: Hashable) -> str:
    text = str(key)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _compile(job: CompileJob, lowered) -> CompiledProgram:
    begin = time.perf_counter()
    compiled = lowered.compile()
    analysis = compiled.memory_analysis()  # None on backends without the analysis
    return CompiledProgram(
        name=job.name,
        key=job.key,
        call=compiled,
        temp_bytes=0 if analysis is None else analysis.temp_size_in_bytes,
        seconds=time.perf_counter() - begin,
    )
