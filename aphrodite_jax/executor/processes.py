"""What the processes of one job tell each other on the host's side: a store of texts, kept by JAX's coordinator.

`jax.distributed.initialize` starts it. JAX has no public way to it; this file is the one that knows the way there is.
"""

import re
from typing import Protocol

import jax
from jax._src import distributed

from aphrodite_jax.errors import LockstepError

__all__ = ["Store", "coordinator", "initialize"]

LAST_ONE_WITHIN = 30 * 24 * 3600
"""Seconds for which a process that has ended waits for the others, which may have more to do; JAX would end them all
after five minutes. That one of them is dead, JAX's heartbeats tell within two minutes."""


class Store(Protocol):
    """Texts by name, the same for all processes."""

    def put(self, name: str, text: str) -> None:
        """Keep a text; a name is used once."""
        ...

    def get(self, name: str, seconds: float) -> str | None:
        """The text of that name, waited for; None where it does not come within ``seconds``."""
        ...

    def delete(self, name: str) -> None:
        """Forget a text."""
        ...


class _Coordinator:
    """The store of a job whose processes run `jax.distributed.initialize`."""

    def __init__(self, client):
        self._client = client

    def put(self, name: str, text: str) -> None:
        self._client.key_value_set(name, text)

    def get(self, name: str, seconds: float) -> str | None:
        try:
            return self._client.blocking_key_value_get(name, max(1, round(1000 * seconds)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise LockstepError(
                f"the coordinator of the job's processes is gone, or another process failed ({error}); look for the "
                "first error in the logs of the others"
            ) from error

    def delete(self, name: str) -> None:
        self._client.key_value_delete(name)


def initialize(where: str | None) -> None:
    """Join the job's other processes, before anything else asks JAX for devices.

    Args:
      where: ``HOST:PORT,PROCESSES,INDEX``: where process 0 keeps the store, how many processes there are, and which
        this one is; or "auto", where JAX finds that out itself, as on Cloud TPU, Slurm or with MPI.

    Raises:
      LockstepError: ``where`` has another form, or they can't be joined.
    """
    options = {}
    if where != "auto":
        match = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", where or "")
        if match is None or not 0 <= int(match[3]) < int(match[2]):
            raise LockstepError(
                f"the processes of a job are given as 'auto' or as HOST:PORT,PROCESSES,INDEX, such as "
                f"10.0.0.2:9911,4,0 for the first of four; got {where!r}"
            )
        options = {"coordinator_address": match[1], "num_processes": int(match[2]), "process_id": int(match[3])}
    try:
        jax.distributed.initialize(**options, shutdown_timeout_seconds=LAST_ONE_WITHIN)
    except Exception as error:  # of many kinds, by the cluster that JAX believes to be in
        raise LockstepError(f"can't join the processes of the job ({where}): {error}") from error


def coordinator() -> Store:
    """The store of this job.

    Raises:
      LockstepError: `jax.distributed.initialize` did not run.
    """
    client = distributed.global_state.client
    if client is None:
        raise LockstepError("this process has not joined others: call jax.distributed.initialize() first")
    return _Coordinator(client)
