"""Compiles a model's programs for devices that need not be there, and works out what they take and give."""

import dataclasses
import functools
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.engine.profiling import media_shapes, media_tokens_per_prompt
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor import memory
from aphrodite_jax.executor.model_programs import DeviceArrays, ModelPrograms, device_bytes, prefill_tokens
from aphrodite_jax.executor.programs import CompileJob, Programs
from aphrodite_jax.modeling.sharding import MODEL
from aphrodite_jax.planning.advice import Needs, remedies
from aphrodite_jax.planning.estimates import Estimator
from aphrodite_jax.planning.report import Memory, Plan, ProgramFigures
from aphrodite_jax.planning.shapes import model_on, whole_model
from aphrodite_jax.planning.targets import Target
from aphrodite_jax.planning.workload import Workload, prompt_length, usual_image

__all__ = ["make_plan"]

PROGRAMS_TAKE = 0.05
"""Of a device's memory, what programs are taken to need until they are compiled."""
NO_COUNTS = (
    "floors and throughput, as JAX's compiler for GPUs that are not there counts no operations and no bytes, and "
    "estimates no kernel"
)


def make_plan(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    target: Target,
    workload: Workload | None = None,
    *,
    estimate_kernels: bool = True,
    price_per_hour: float | None = None,
    export: bool = False,
) -> Plan:
    """What the model takes on ``target``, and what it gives at most; nothing runs but compilers.

    Args:
      model_config: of a model whose weights need not be there.
      engine_config: ``tensor_parallel_size`` times ``data_parallel_size`` must be the devices of the target.
      workload: None takes the default.
      estimate_kernels: whether to have the compiler estimate the attention kernels, each in a process of its own.
      price_per_hour: of all of the target, in any currency.
      export: compile every program and keep it in ``engine_config.programs_dir``.

    Raises:
      ConfigError: an option, a config or a missing file with which nothing could be planned.
    """
    planner = _Planner(model_config, engine_config, target, workload or Workload())
    return planner.plan(estimate_kernels=estimate_kernels, price_per_hour=price_per_hour, export=export)


class _DoesNotFit(Exception):
    """Why, in words."""


class _Planner:
    def __init__(self, model_config: ModelConfig, engine_config: EngineConfig, target: Target, workload: Workload):
        devices, copies = engine_config.tensor_parallel_size, engine_config.data_parallel_size
        if devices * copies != len(target.devices):
            raise ConfigError(
                f"tensor_parallel_size {devices} x data_parallel_size {copies} is not the {len(target.devices)} "
                f"devices of {target.name}"
            )
        self._began = time.perf_counter()
        self._model_config, self._engine_config = model_config, engine_config
        self._target, self._devices, self._copies = target, devices, copies
        self._model = whole_model(model_config)
        self._image = usual_image(model_config, workload.image_size)
        self._workload = self._settle(workload)
        self._mesh = Mesh(np.array(target.devices[:devices]), (MODEL,))
        media_budget = media_tokens_per_prompt(model_config)
        self._made = ModelPrograms(
            model_on(self._model, self._mesh, engine_config.encoder_parallel),
            model_config,
            engine_config,
            media_budget=media_budget,
            max_num_batched_tokens=prefill_tokens(model_config, engine_config, media_budget),
            media_shapes=functools.partial(media_shapes, model_config),
            mesh=self._mesh,
            platform=target.platform,
        )
        self._limit = int(target.memory * engine_config.memory_fraction)
        self._figures: list[ProgramFigures] = []
        self._planned: Programs | None = None
        self._asked = self._workload.requests or 1

    def plan(self, *, estimate_kernels: bool, price_per_hour: float | None, export: bool) -> Plan:
        made = self._made
        assumed = made.arrays(1 if export else self._assumed_pages())  # programs to be kept are for the engine's pages
        common: dict[str, Any] = dict(
            model=self._model_config.model,
            topology=self._target.name,
            device_kind=self._target.devices[0].device_kind,
            num_devices=len(self._target.devices),
            tensor_parallel_size=self._devices,
            data_parallel_size=self._copies,
            dtype=str(made.dtype),
            max_model_len=made.context_length,
            max_num_seqs=made.num_slots,
            requests_asked=self._asked,
            image_tokens=None if self._image is None else self._image.tokens,
        )
        try:
            planned, compiled_for = self._compile_planned(assumed)
            self._planned = planned
            num_pages = self._num_pages(planned)
            self._workload = self._within(num_pages * made.page_size)
            arrays = made.arrays(num_pages)
            if export:
                compiled_for = arrays
            estimator = Estimator(made, self._target, self._model_config, self._workload, self._image, compiled_for)
            with ThreadPoolExecutor() as pool:
                is_tpu = self._target.platform == "tpu"
                count = pool.submit(estimator.decode_count()) if is_tpu else None
                kernels = pool.submit(estimator.kernels) if is_tpu and estimate_kernels else None
                programs = self._export(arrays) if export else planned
                self._compile(estimator.jobs, compiled_for, programs)
        except _DoesNotFit as reason:
            return Plan(
                **common,
                workload=self._workload,
                fits=False,
                reason=str(reason),
                remedies=remedies(self._needs(), self._target, str(made.dtype)),
                memory=self._memory(assumed, 0),
                programs=tuple(self._figures),
                seconds=time.perf_counter() - self._began,
            )
        common["workload"] = self._workload
        figures = self._memory(arrays, num_pages)
        if count is None:
            return Plan(
                **common,
                fits=True,
                memory=figures,
                programs=tuple(self._figures),
                missing=NO_COUNTS,
                seconds=time.perf_counter() - self._began,
            )
        estimates = estimator.estimates(
            decode=programs.get(estimator.decode_job),
            decode_count=count.result(),
            forward=programs.get(estimator.forward_job),
            encode=None if estimator.encode_job is None else programs.get(estimator.encode_job),
            kernels=() if kernels is None else kernels.result(),
        )
        throughput = estimator.throughput(estimates, self._copies, price_per_hour)
        return Plan(
            **common,
            fits=True,
            memory=figures,
            programs=tuple(self._figures),
            estimates=estimates,
            throughput=throughput,
            seconds=time.perf_counter() - self._began,
        )

    def _settle(self, workload: Workload) -> Workload:
        """The workload with its defaults filled in."""
        images = workload.images_per_prompt
        if self._image is None and images:
            raise ConfigError(f"images_per_prompt is {images}, but the model takes no images")
        if images is None:
            images = int(self._image is not None)
        limit = self._model_config.limit_for("image")
        if images > limit:
            raise ConfigError(f"images_per_prompt {images} is above limit_mm_per_prompt, {limit} for images")
        requests = workload.requests or self._engine_config.max_num_seqs
        if requests > self._engine_config.max_num_seqs:
            raise ConfigError(
                f"{requests} requests at a time are above max_num_seqs {self._engine_config.max_num_seqs}"
            )
        settled = dataclasses.replace(workload, requests=requests, images_per_prompt=images)
        length = prompt_length(settled, self._image) + settled.output_tokens
        if length > self._model_config.context_length:
            raise ConfigError(
                f"a request of the plan has {length} tokens, above max_model_len {self._model_config.context_length}: "
                "plan for fewer tokens or smaller images, or raise max_model_len"
            )
        return settled

    # Compiling.

    def _assumed_pages(self) -> int:
        """About as many pages as there will be."""
        one = self._made.arrays(1)
        room = self._engine_config.kv_cache_memory
        if room is None:
            programs = int(PROGRAMS_TAKE * self._target.memory)
            room = self._limit - programs - device_bytes(one.params) - device_bytes(one.encoder_cache)
        return max(1, room // device_bytes(one.kv_caches))

    def _compile_planned(self, arrays: DeviceArrays) -> tuple[Programs, DeviceArrays]:
        """The largest program of each kind, which tell how much is left for pages, and what they are compiled for.

        The engine compiles them for one page at its start; as many as there will be spare a plan compiling them again.
        """
        made = self._made
        fixed = device_bytes(arrays.params) + device_bytes(arrays.encoder_cache)
        if fixed > self._limit:
            raise _DoesNotFit(
                f"weights and encoder cache take {_gib(fixed)} of a device, of whose {_gib(self._target.memory)} "
                f"{_gib(self._limit)} may be used"
            )
        try:
            return self._compile([x.job for x in made.representatives(arrays)], arrays), arrays
        except _DoesNotFit:
            if arrays.num_pages == 1:
                raise
        one = made.arrays(1)  # programs are larger than was assumed
        return self._compile([x.job for x in made.representatives(one)], one), one

    def _export(self, arrays: DeviceArrays) -> Programs:
        saved = self._made.saved_programs(self._model_config, self._engine_config)
        assert saved is not None, "programs_dir says where to export to"
        return self._compile(self._made.all_jobs(arrays), arrays, Programs("raise", self._mesh, saved))

    def _compile(self, jobs: list[CompileJob], arrays: DeviceArrays, programs: Programs | None = None) -> Programs:
        """Compile what ``programs`` has not yet."""
        programs = Programs("raise", self._mesh) if programs is None else programs
        missing = [job for job in jobs if not programs.has(job)]
        try:
            with warnings.catch_warnings():
                # A compiler without devices writes JAX's cache of programs and can't read it.
                warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
                programs.compile(missing, show_progress=self._engine_config.show_progress)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _DoesNotFit(f"the compiler refuses a program: {_first_line(error)}") from error
        self._figures += [_figures(programs, job, arrays.num_pages) for job in missing]
        return programs

    # Memory.

    def _num_pages(self, planned: Programs) -> int:
        try:
            return memory.plan_pages(self._made, self._engine_config, self._limit, planned)  # compiles nothing anew
        except ConfigError as error:
            used = memory.bytes_beside_pages(self._made, planned)
            raise _DoesNotFit(
                f"weights, encoder cache and programs take {_gib(used)} of the {_gib(self._limit)} of a device that "
                f"may be used; {error}"
            ) from error

    def _memory(self, arrays: DeviceArrays, num_pages: int) -> Memory:
        made, code = self._made, 0
        if self._planned is not None:
            code = memory.code_of_all(made.representatives(made.arrays(1)), self._planned)
        page = device_bytes(made.arrays(1).kv_caches)
        temporary = max((x.temp_bytes for x in self._figures), default=0)
        return Memory(
            device=self._target.memory,
            usable=self._limit,
            weights=device_bytes(arrays.params),
            encoder_cache=device_bytes(arrays.encoder_cache),
            code=code,
            temporary=temporary,
            kv_pages=num_pages * page,
            kv_bytes_per_token=page / made.page_size,
            kv_tokens=num_pages * made.page_size,
            full_requests=num_pages // made.max_pages,
        )

    def _needs(self) -> Needs:
        made, config = self._made, self._engine_config
        one = made.arrays(1)
        programs = None
        if self._planned is not None:
            lying = device_bytes(one.params) + device_bytes(one.encoder_cache)
            programs = memory.bytes_beside_pages(made, self._planned) - lying
        return Needs(
            model=self._model,
            model_config=self._model_config,
            encoder_parallel=config.encoder_parallel,
            devices=self._devices,
            context_length=made.context_length,
            page_size=made.page_size,
            kv_shapes=tuple(type(self._model).kv_cache_shapes(self._model_config.hf_config)),
            platform=self._target.platform,
            itemsize=made.dtype.itemsize,
            encoder_cache=one.encoder_cache.shape,
            programs=programs,
            limit=self._limit,
        )

    def _within(self, kv_tokens: int) -> Workload:
        """The workload with no more requests than the pages hold at a time."""
        room = kv_tokens // (prompt_length(self._workload, self._image) + self._workload.output_tokens)
        return dataclasses.replace(self._workload, requests=max(1, min(self._asked, room)))


def _figures(programs: Programs, job: CompileJob, pages: int) -> ProgramFigures:
    program = programs.get(job)
    analysis = program.call.memory_analysis()
    return ProgramFigures(
        name=job.name,
        bucket=str(job.key),
        pages=pages,
        seconds=program.seconds,
        temp_bytes=program.temp_bytes,
        code_bytes=program.code_bytes,
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
