"""Which devices serve a model: one process alone, and several that share it or don't."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aphrodite_jax.errors import ConfigError, LockstepError
from aphrodite_jax.executor import mesh as meshes
from aphrodite_jax.executor.processes import coordinator, initialize

pytestmark = pytest.mark.once


def devices(per_process, processes):
    return [
        SimpleNamespace(process_index=process, id=2048 * process + index, device_kind="TPU v5 lite")
        for process in range(processes)
        for index in range(per_process)
    ]


@pytest.fixture
def pretend(monkeypatch):
    """Have JAX find devices that are not there; meshes are then plain records of them."""

    def there_are(per_process, processes, process=0):
        found = devices(per_process, processes)
        monkeypatch.setattr(meshes, "Mesh", lambda array, axes: SimpleNamespace(devices=array, axes=axes))
        for name, value in {
            "devices": found,
            "device_count": len(found),
            "local_device_count": per_process,
            "process_count": processes,
            "process_index": process,
        }.items():
            monkeypatch.setattr(jax, name, lambda value=value: value)

    return there_are


def test_one_device_needs_no_mesh(pretend):
    pretend(4, 1)
    assert meshes.make_mesh(1, 1) is None
    assert meshes.replica_meshes(None) == (None,)


def test_rows_are_copies(pretend):
    pretend(8, 1)
    mesh = meshes.make_mesh(2, 3)
    assert (mesh.devices.shape, mesh.axes) == ((3, 2), ("data", "model"))
    rows = meshes.replica_meshes(mesh)
    assert [[device.id for device in row.devices] for row in rows] == [[0, 1], [2, 3], [4, 5]]
    assert {row.axes for row in rows} == {("model",)}


@pytest.mark.parametrize(
    ("tensor", "data", "process", "rows", "shared_by", "share"),
    [
        (4, 4, 1, [[2048, 2049, 2050, 2051]], (1,), (1, 4)),  # a row a process
        (2, 8, 1, [[2048, 2049], [2050, 2051]], (1,), (1, 4)),  # two rows a process
        (8, 2, 3, [[4096, 4097, 4098, 4099, 6144, 6145, 6146, 6147]], (2, 3), (1, 2)),  # a row of two processes
    ],
)
def test_a_process_serves_the_rows_that_have_its_devices(pretend, tensor, data, process, rows, shared_by, share):
    pretend(4, 4, process)
    mesh = meshes.make_mesh(tensor, data)
    found = meshes.replica_meshes(mesh)
    assert [[device.id for device in row.devices] for row in found] == rows
    assert meshes.processes_of(found[0]) == shared_by
    assert meshes.share_of_work(mesh) == share


@pytest.mark.parametrize(
    ("per_process", "processes", "tensor", "data", "message"),
    [
        (4, 1, 3, 2, "tensor_parallel_size 3 x data_parallel_size 2, but JAX finds 4 devices"),
        (4, 2, 4, 1, "tensor_parallel_size is 4 leaves devices of 2 processes idle: the product must be 8"),
        (4, 3, 6, 2, "each process has 4 devices: the first must divide these, or be a multiple of them"),
    ],
)
def test_uneven_shares_are_refused(pretend, per_process, processes, tensor, data, message):
    pretend(per_process, processes)
    with pytest.raises(ConfigError, match=message):
        meshes.make_mesh(tensor, data)


def test_a_part_of_a_model_is_not_copied():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    (row,) = meshes.replica_meshes(mesh)
    shardings = {1: NamedSharding(mesh, P()), 2: NamedSharding(mesh, P(None, "model"))}
    linear = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(linear)
    placed = nnx.merge(graphdef, jax.tree.map(lambda x: jax.device_put(x, shardings[x.ndim]), state))
    part = meshes.part_on(placed, row)
    assert part.kernel[...].sharding == NamedSharding(row, P(None, "model"))
    one, other = (x.kernel[...].addressable_shards[0].data for x in (placed, part))
    assert one.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()


@pytest.mark.parametrize("where", ["", "localhost", "localhost:1,2", "localhost:1,2,2", "host,1,0"])
def test_processes_are_named_in_one_form(where):
    with pytest.raises(LockstepError, match="given as 'auto' or as HOST:PORT,PROCESSES,INDEX"):
        initialize(where)


def test_without_other_processes_there_is_no_store():
    with pytest.raises(LockstepError, match=r"call jax.distributed.initialize\(\) first"):
        coordinator()
