"""The devices that serve a model, as one mesh: its axis ``model`` divides a copy of it, its axis ``data`` has copies.

Each row of the mesh, a *replica*, runs programs of its own, so copies wait for nothing of each other's. Where JAX runs
in several processes (`jax.distributed`), a process serves the rows that have devices of its own: whole rows, or one row
that it shares with others, which then all run the same schedule (`aphrodite_jax.engine.lockstep`).
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.sharding import MODEL

__all__ = ["DATA", "make_mesh", "part_on", "processes_of", "replica_meshes", "share_of_work"]

DATA = "data"
"""The mesh axis along which there are copies of the model."""


def make_mesh(tensor_parallel_size: int, data_parallel_size: int = 1) -> Mesh | None:
    """A mesh ``[data, model]`` over the first devices; None where a process has one device to use and that is its own.

    Raises:
      ConfigError: there are fewer devices, or they would be shared out unevenly among the processes.
    """
    devices, processes = jax.devices(), jax.process_count()
    wanted = tensor_parallel_size * data_parallel_size
    if wanted == processes == 1:
        return None
    asked = f"tensor_parallel_size {tensor_parallel_size} x data_parallel_size {data_parallel_size}"
    if data_parallel_size == 1:
        asked = f"tensor_parallel_size is {tensor_parallel_size}"
    if wanted > len(devices):
        raise ConfigError(
            f"{asked}, but JAX finds {len(devices)} device{'s' * (len(devices) > 1)} ({devices[0].device_kind})"
        )
    if processes > 1:
        _check_processes(tensor_parallel_size, wanted, asked)
    return Mesh(np.array(devices[:wanted]).reshape(data_parallel_size, tensor_parallel_size), (DATA, MODEL))


def replica_meshes(mesh: Mesh | None) -> tuple[Mesh | None, ...]:
    """The rows that this process serves, each as a mesh ``[model]``; one None for the default device alone."""
    if mesh is None:
        return (None,)
    process = jax.process_index()
    rows = [row for row in mesh.devices if any(device.process_index == process for device in row)]
    return tuple(Mesh(row, (MODEL,)) for row in rows)


def processes_of(mesh: Mesh | None) -> tuple[int, ...]:
    """The processes that have devices of ``mesh``."""
    if mesh is None:
        return (jax.process_index(),)
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def share_of_work(mesh: Mesh | None) -> tuple[int, int]:
    """Which share of a job this process does, from 0, and of how many: those that serve a replica together do one."""
    if mesh is None or len(processes_of(replica_meshes(mesh)[0])) == 1:
        return jax.process_index(), jax.process_count()
    process = jax.process_index()
    rows = [index for index, row in enumerate(mesh.devices) if any(x.process_index == process for x in row)]
    return rows[0], len(mesh.devices)


def part_on(model: Any, mesh: Mesh | None) -> Any:
    """The copy of a model that lies on one row of the mesh it was loaded for; nothing is copied."""
    if mesh is None:
        return model
    devices = set(mesh.devices.flat)

    def part(array: jax.Array) -> jax.Array:
        assert isinstance(array.sharding, NamedSharding)
        shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
        sharding = NamedSharding(mesh, array.sharding.spec)
        return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(part, state))


def _check_processes(tensor_parallel_size: int, wanted: int, asked: str) -> None:
    """Every process has a part in the work, and a row has whole processes or a process whole rows."""
    local, total = jax.local_device_count(), jax.device_count()
    if wanted != total:
        raise ConfigError(
            f"{asked} leaves devices of {jax.process_count()} processes idle: the product must be {total}, the "
            "number of devices of all processes"
        )
    if local % tensor_parallel_size and tensor_parallel_size % local:
        raise ConfigError(
            f"{asked}, but each process has {local} devices: the first must divide these, or be a multiple of them"
        )
