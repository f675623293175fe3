"""Programs of a check: compiled in haste, when they are first wanted, and counted."""

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aphrodite_jax.executor.programs import CompiledProgram, CompileJob, Programs

__all__ = ["DeclaredPrograms", "compile_fast", "fast_options", "temp_bytes"]

HASTE: Mapping[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,  # nearly all of the time, until XLA lost the choice
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA with which it takes a third of the time: programs of tiny models run once or twice."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX records for each program that it compiles, or finds among those kept between runs."""


@functools.cache
def fast_options() -> dict[str, Any]:
    """Those of `HASTE` that this version of XLA knows."""
    return {name: value for name, value in HASTE.items() if _is_known(name, value)}


def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda x: -x, compiler_options={name: value}).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def compile_fast(fn: Callable, *args: Any, donate: Sequence[int] = ()) -> Any:
    """``fn`` for arrays of the shapes of ``args``, compiled ahead of time."""
    return jax.jit(fn, donate_argnums=donate, compiler_options=fast_options()).lower(*args).compile()


def temp_bytes(compiled: Any) -> int:
    """Memory that a program takes while it runs, as the compiler tells; 0 where it does not."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


class DeclaredPrograms(Programs):
    """An engine's programs, of which those that its warm-up declares are compiled when they run first.

    A declared program is compiled for the shapes of its declaration, whatever it is called with. What is not declared
    would be late after a real warm-up: it runs, and ``late`` tells of each time.
    """

    def __init__(self):
        super().__init__("raise")
        self.late: list[str] = []
        self._declared: dict[tuple[str, Hashable], CompileJob] = {}
        self._is_compiling = False

    def compile(self, jobs: Sequence[CompileJob], *, show_progress: bool) -> None:
        """Declare programs."""
        for job in jobs:
            args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), job.args)
            shapes = CompileJob(name=job.name, key=job.key, fn=job.fn, args=args, donate=job.donate)
            self._declared.setdefault((job.name, job.key), shapes)

    def run(self, job: CompileJob) -> Any:
        """As `Programs.run`."""
        declared = self._declared.get((job.name, job.key))
        if declared is None:
            self.late.append(f"{job.name} for {job.key}")
        if (job.name, job.key) not in self._compiled:
            self._compiled[job.name, job.key] = self._compile(declared or job)
        return super().run(job)

    def _compile(self, job: CompileJob) -> CompiledProgram:
        begin = time.perf_counter()
        self._is_compiling = True
        try:
            compiled = compile_fast(job.fn, *job.args, donate=job.donate)
        finally:
            self._is_compiling = False
        return CompiledProgram(
            name=job.name,
            key=job.key,
            call=compiled,
            temp_bytes=temp_bytes(compiled),
            seconds=time.perf_counter() - begin,
        )

    @contextlib.contextmanager
    def compiled_beside(self) -> Iterator[list[str]]:
        """A list that grows by the name of each program that anybody else compiles meanwhile."""
        names: list[str] = []

        def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
            if event == COMPILED and not self._is_compiling:
                names.append(str(kwargs.get("fun_name", "a program")))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
