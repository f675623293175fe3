"""A worker of a job on Ray: an `LLM`, alone on its host or together with others of the same slice."""

import socket
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from aphrodite_jax.batch.on_ray import RayOptions
from aphrodite_jax.batch.parts import open_parts
from aphrodite_jax.batch.run_parts import run_parts
from aphrodite_jax.errors import AphroditeError
from aphrodite_jax.executor.processes import initialize

__all__ = ["RayWorker", "place_worker"]

_POLL = 0.5


def place_worker(options: RayOptions) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` that say where a worker runs."""
    if options.hosts == 1 and options.tpu_slice is None:
        return _as_arguments(options.resources)
    return {"num_cpus": 0, "ray_remote_args_fn": lambda: {"scheduling_strategy": _first_host(options)}}


def _as_arguments(resources: Mapping[str, float]) -> dict[str, Any]:
    """``num_cpus``, ``num_gpus`` and ``resources`` of an actor."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    arguments: dict[str, Any] = {"num_cpus": resources.get("CPU", 0)}
    if "GPU" in resources:
        arguments["num_gpus"] = resources["GPU"]
    return arguments | ({"resources": others} if others else {})


def _first_host(options: RayOptions) -> PlacementGroupSchedulingStrategy:
    """The first of some hosts that are set aside together: a TPU slice, or any hosts that have what is asked for."""
    if options.tpu_slice is not None:
        from ray.util.tpu import slice_placement_group

        version, _, topology = options.tpu_slice.partition(":")
        group = slice_placement_group(topology, version).placement_group
        assert group is not None, "of one slice"
    else:
        group = placement_group([dict(options.resources)] * options.hosts, strategy="PACK")
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)


class RayWorker:
    """Does parts of a job; called by Ray Data with one task after another.

    Args:
      job_options, llm_options, options: as for `run_on_ray`.
      flag: an actor that tells when to stop.
    """

    def __init__(self, job_options: Mapping[str, Any], llm_options: Mapping[str, Any], options: RayOptions, flag: Any):
        self._stop = _Watched(flag)
        self._others: list[Any] = []
        self._host = _Host(job_options, llm_options)
        self._error: AphroditeError | None = None
        try:
            self._load()
        except AphroditeError as error:
            self._error = error  # told by the first task

    def _load(self) -> None:
        group = ray.util.get_current_placement_group()
        if group is not None and group.bundle_count > 1:
            self._gather(group)
        loading = [other.load.remote() for other in self._others]
        self._host.load()
        ray.get(loading)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Do the parts of a task; figures of it, or what went wrong: Ray would keep only the text of an exception."""
        try:
            if self._error is not None:
                raise self._error
            told: dict[str, Any] = self._run([int(part) for part in batch["parts"][0]])
        except AphroditeError as error:
            told = {"error": type(error).__name__, "message": str(error)}
        return {name: np.array([value]) for name, value in told.items()}

    def _run(self, parts: list[int]) -> dict[str, int]:
        running = [other.run.remote(parts) for other in self._others]
        figures = self._host.run(parts, self._stop)
        ray.get(running)
        return figures

    def _gather(self, group: PlacementGroup) -> None:
        """Start a process on each other host of the group, and join them all."""
        hosts = group.bundle_count
        address = f"{ray.util.get_node_ip_address()}:{_free_port()}"
        for index in range(1, hosts):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            arguments = _as_arguments(group.bundle_specs[index])
            other = ray.remote(_Host).options(scheduling_strategy=place, **arguments).remote(*self._host.options)
            self._others.append(other)
        joining = [other.join.remote(f"{address},{hosts},{index + 1}") for index, other in enumerate(self._others)]
        self._host.join(f"{address},{hosts},0")
        ray.get(joining)


class _Host:
    """One process of a worker: the model, or a part of it."""

    def __init__(self, job_options: Mapping[str, Any], llm_options: Mapping[str, Any]):
        self.options = self._job_options, self._llm_options = job_options, llm_options

    def join(self, where: str) -> None:
        """Join the processes of other hosts."""
        initialize(where)

    def load(self) -> None:
        """Load the model and open the job."""
        from aphrodite_jax.llm import LLM

        self._llm = LLM(**self._llm_options)
        self._job = open_parts(**self._job_options, model_config=self._llm.model_config)

    def run(self, parts: list[int], stop: Any = None) -> dict[str, int]:
        """Do parts of the job."""
        report = run_parts(self._llm, self._job, parts, stop=stop, show_progress=False)
        names = ("answered", "failed", "resumed", "prompt_tokens", "completion_tokens")
        figures = {name: getattr(report, name) for name in names}
        return figures | {"rows": report.answered + report.failed - report.resumed}


class _Watched:
    """A flag elsewhere in the cluster, looked at twice a second by a thread."""

    def __init__(self, flag: Any):
        self._flag, self._is_set = flag, threading.Event()
        threading.Thread(target=self._watch, name="watch for a stop", daemon=True).start()

    def is_set(self) -> bool:
        """Whether it was set when it was looked at last."""
        return self._is_set.is_set()

    def _watch(self) -> None:
        while not self._is_set.wait(_POLL):
            try:
                seen = ray.get(self._flag.is_set.remote())
            except RayError:  # whoever started this job is gone, and with it the reason to go on
                seen = True
            if seen:
                self._is_set.set()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
