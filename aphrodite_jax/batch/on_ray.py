"""A job on many machines: its parts shared out by Ray Data among an actor pool of `LLM` workers.

What goes through Ray is which parts are to be done, and figures. Workers read the input and write the output
themselves, as a run on one machine does, so whatever dies costs no row: Ray gives the parts of a worker that is gone to
another one, which goes on from their journals.
"""

import collections
import contextlib
import dataclasses
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from aphrodite_jax import errors
from aphrodite_jax.batch.parts import PartsReport, open_parts
from aphrodite_jax.batch.progress import Progress
from aphrodite_jax.batch.run_parts import Stop
from aphrodite_jax.config import split_options
from aphrodite_jax.errors import BatchError, ConfigError

__all__ = ["RayOptions", "run_on_ray"]

TASKS_PER_WORKER = 8
"""Into so many tasks a worker's share of the parts is cut: few keep engines full, many let all workers end together."""
MOST_PARTS = 8
"""Parts of one task."""
_POLL = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How many workers there are, and where.

    Attributes:
      workers: of the pool; each is one `LLM`.
      resources: of each worker, or of each of its hosts, by Ray's names: ``{"CPU": 1}``, ``{"TPU": 4}``, say.
      hosts: machines that serve one model together; more than 1 for a model that is divided over several.
      tpu_slice: ``v5e:4x4``, say: each worker gets such a slice for itself; ``hosts`` and ``resources`` follow from it.
      address: of a running cluster; None takes ``RAY_ADDRESS``, or else starts one of this machine alone.

    Raises:
      ConfigError: a number below 1, or a slice of another form.
    """

    workers: int = 1
    resources: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"CPU": 1.0})
    hosts: int = 1
    tpu_slice: str | None = None
    address: str | None = None

    def __post_init__(self):
        for name in ("workers", "hosts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.resources or min(self.resources.values()) <= 0:
            raise ConfigError(f"resources of a worker are like CPU=1 or TPU=4, got {dict(self.resources)}")
        if self.tpu_slice is not None and not all(self.tpu_slice.partition(":")):
            raise ConfigError(f"a TPU slice is like v5e:4x4, got {self.tpu_slice!r}")


def run_on_ray(
    job_options: Mapping[str, Any],
    llm_options: Mapping[str, Any],
    options: RayOptions,
    *,
    stop: Stop | None = None,
    max_failures: int | None = None,
    show_progress: bool = True,
) -> PartsReport:
    """Answer the rows of a job's parts that have no answer yet, on the machines of a cluster.

    Args:
      job_options: arguments of `open_parts` but for ``model_config``; paths that every machine sees.
      llm_options: arguments of `LLM`.
      stop, max_failures, show_progress: as for `run_parts`; failures are counted as tasks end.

    Raises:
      BatchError: as `run_parts`; or Ray has no place for the workers, or parts are left that none could do.
      ConfigError: the model or its options can't be used.
    """
    ray = _ray()
    job = open_parts(**job_options, model_config=split_options(llm_options)[0])
    stop = stop or threading.Event()
    standing = first = job.standing()
    figures, began = collections.Counter(), time.monotonic()
    with _cluster(ray, options), _flag(ray, stop) as flag, Progress(standing, show=show_progress) as progress:
        while not standing.is_complete and not stop.is_set():
            left = sorted(set(range(job.num_units)) - standing.done)
            for figure in _run_tasks(ray, left, (dict(job_options), dict(llm_options), options, flag)):
                figures.update(figure)
                progress.add(figure["rows"], failed=figure["failed"], tokens=figure["completion_tokens"])
                num_failed = first.failed + figures["failed"]
                if max_failures is not None and num_failed > max_failures:
                    raise BatchError(
                        f"{num_failed} rows failed, more than max_failures {max_failures} allows; what is in "
                        f"{job.place!r} stays, and the same job goes on from there with a higher limit"
                    )
            before, standing = standing, job.standing()
            if len(standing.done) == len(before.done):
                break  # another run works on what is left
    seconds = time.monotonic() - began
    return PartsReport(
        parts=standing.parts,
        rows=standing.rows,
        answered=first.answered + figures["answered"],
        failed=first.failed + figures["failed"],
        resumed=first.done_rows + figures["resumed"],
        held=0 if stop.is_set() else standing.parts - len(standing.done),
        prompt_tokens=figures["prompt_tokens"],
        completion_tokens=figures["completion_tokens"],
        seconds=round(seconds, 3),
        rows_per_second=round(figures["rows"] / seconds, 2),
        tokens_per_second=round(figures["completion_tokens"] / seconds, 2),
        stopped=stop.is_set(),
    )


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BatchError("Ray is not installed: pip install 'aphrodite-jax[ray]'") from error
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, options: RayOptions) -> Iterator[None]:
    """A connection to the cluster; where it is made here, it is closed in the end, and what was started ends."""
    if ray.is_initialized():
        yield
        return
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    try:
        with warnings.catch_warnings():
            # Ray's processes begin as forks of this one, in which JAX has threads; they are other programs at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(address=address, include_dashboard=False if address == "local" else None)
    except ConnectionError as error:
        raise BatchError(f"can't reach a Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens: Ray would try for minutes, and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BatchError(f"nobody listens at {address}, where a Ray cluster should be: {error}") from error


@contextlib.contextmanager
def _flag(ray: Any, stop: Stop) -> Iterator[Any]:
    """An actor that tells workers when to stop: when ``stop`` is set, or something went wrong here."""
    flag = ray.remote(num_cpus=0)(threading.Event).remote()
    left = threading.Event()

    def watch() -> None:
        while not left.is_set() and not stop.is_set():
            left.wait(_POLL)
        flag.set.remote()

    thread = threading.Thread(target=watch, name="tell workers to stop", daemon=True)
    thread.start()
    try:
        yield flag
    finally:
        left.set()
        thread.join()


def _run_tasks(ray: Any, parts: list[int], of_worker: tuple) -> Iterator[Mapping[str, int]]:
    """Share parts out among the workers; figures of each task that has ended."""
    from aphrodite_jax.batch.ray_worker import RayWorker, free_hosts, place_worker

    options: RayOptions = of_worker[2]
    hosts = f"aphrodite-{uuid.uuid4()}"  # begins the name of hosts that a worker sets aside
    size = max(1, min(MOST_PARTS, len(parts) // (options.workers * TASKS_PER_WORKER)))
    tasks = [{"parts": parts[begin : begin + size]} for begin in range(0, len(parts), size)]
    workers = min(options.workers, len(tasks))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one of the job
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        RayWorker,
        fn_constructor_args=(*of_worker, hosts),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        **place_worker(options),
    )
    try:
        for told in dataset.iter_rows():
            if "error" in told:
                raise getattr(errors, told["error"])(told["message"])
            yield {name: int(value) for name, value in told.items()}
    except ray.exceptions.RayError as error:
        raise BatchError(f"Ray could not run the workers: {error}") from error
    finally:
        free_hosts(hosts)
