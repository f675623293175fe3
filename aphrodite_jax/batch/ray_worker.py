"""A worker of a job on Ray: an `LLM`, alone on its host or together with others of the same slice."""

import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from aphrodite_jax.batch.on_ray import RayOptions
from aphrodite_jax.batch.parts import open_parts
from aphrodite_jax.batch.run_parts import run_parts
from aphrodite_jax.errors import AphroditeError
from aphrodite_jax.executor.processes import initialize

__all__ = ["RayWorker", "free_hosts", "place_worker"]

_POLL = 0.5


def place_worker(options: RayOptions) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` that say where a worker runs; one of several hosts places these itself."""
    return {"num_cpus": 0} if _has_several(options) else _as_arguments(options.resources)


def free_hosts(name: str) -> None:
    """Give back hosts that workers have set aside, whose names begin so."""
    for group in placement_group_table().values():
        if group["name"].startswith(name) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


def _has_several(options: RayOptions) -> bool:
    return options.hosts > 1 or options.tpu_slice is not None


def _as_arguments(resources: Mapping[str, float]) -> dict[str, Any]:
    """``num_cpus``, ``num_gpus`` and ``resources`` of an actor."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    arguments: dict[str, Any] = {"num_cpus": resources.get("CPU", 0)}
    if "GPU" in resources:
        arguments["num_gpus"] = resources["GPU"]
    return arguments | ({"resources": others} if others else {})


class RayWorker:
    """Does parts of a job; called by Ray Data with one task after another.

    Args:
      job_options, llm_options, options: as for `run_on_ray`.
      flag: an actor that tells when to stop.
      hosts: begins the name of hosts that this worker sets aside.
    """

    def __init__(
        self,
        job_options: Mapping[str, Any],
        llm_options: Mapping[str, Any],
        options: RayOptions,
        flag: Any,
        hosts: str,
    ):
        self._error: AphroditeError | None = None
        try:
            if _has_several(options):
                self._run = _start_hosts((job_options, llm_options, flag), options, f"{hosts}-{uuid.uuid4()}")
            else:
                self._run = _Host(job_options, llm_options, flag).run
        except AphroditeError as error:
            self._error = error  # told by the first task

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Do the parts of a task; figures of it, or what went wrong: Ray would keep only the text of an exception."""
        try:
            if self._error is not None:
                raise self._error
            told: dict[str, Any] = dict(self._run([int(part) for part in batch["parts"][0]]))
        except AphroditeError as error:
            cause = getattr(error, "cause", error)  # of an error of another host
            told = {"error": type(cause).__name__, "message": str(cause)}
        return {name: np.array([value]) for name, value in told.items()}


def _start_hosts(of_host: tuple, options: RayOptions, name: str) -> Callable[[list[int]], Mapping[str, int]]:
    """Start a process on each of some hosts that are set aside together, and join them; what runs parts on all."""
    if options.tpu_slice is not None:
        from ray.util.tpu import slice_placement_group

        version, _, topology = options.tpu_slice.partition(":")
        group = slice_placement_group(topology, version, name=name).placement_group
        assert group is not None, "of one slice"
    else:
        group = placement_group([dict(options.resources)] * options.hosts, strategy="PACK", name=name)
    hosts = [
        ray.remote(_Host)
        .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index), **_as_arguments(bundle))
        .remote(*of_host, load=False)
        for index, bundle in enumerate(group.bundle_specs)
    ]
    address = ray.get(hosts[0].address.remote())
    ray.get([host.join.remote(f"{address},{len(hosts)},{index}") for index, host in enumerate(hosts)])
    ray.get([host.load.remote() for host in hosts])
    return lambda parts: ray.get([host.run.remote(parts) for host in hosts])[0]


class _Host:
    """One process of a worker: the model, or a part of it."""

    def __init__(self, job_options: Mapping[str, Any], llm_options: Mapping[str, Any], flag: Any, *, load: bool = True):
        self._job_options, self._llm_options = job_options, llm_options
        self._stop = _Watched(flag)
        if load:
            self.load()

    def address(self) -> str:
        """Where processes may join this one."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def join(self, where: str) -> None:
        """Join the processes of other hosts."""
        initialize(where)

    def load(self) -> None:
        """Load the model and open the job."""
        from aphrodite_jax.llm import LLM

        self._llm = LLM(**self._llm_options)
        self._job = open_parts(**self._job_options, model_config=self._llm.model_config)

    def run(self, parts: list[int]) -> dict[str, int]:
        """Do parts of the job."""
        report = run_parts(self._llm, self._job, parts, stop=self._stop, show_progress=False)
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
