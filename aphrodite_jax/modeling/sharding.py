"""Where parameters lie on a mesh: logical axes by name, and one table from these to the mesh's axes.

Along the mesh axis ``model`` the heads of attention, the inner width of feed-forwards and the vocabulary are divided.
Then a layer needs two sums over the devices, behind the attention's output and behind the feed-forward's, and no
parameter ever moves.

    q, k, v, gate, up   each device has some columns        its own heads and inner rows follow
    o, down             each device has the rows to match   parts of the output, which are summed up
    embeddings, head    each device has a part of the vocabulary

Key and value heads that are fewer than the devices lie whole on each of them; every device keeps pages of the one that
its query heads read. What no pattern names lies whole everywhere: norms, positions, projectors, and matrices in which
several projections stand side by side.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aphrodite_jax.errors import ConfigError

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "MODEL",
    "check_heads",
    "current_mesh",
    "model_axis_size",
    "over_model_axis",
    "parameter_shardings",
    "whole",
]

MODEL = "model"
"""The mesh axis along which one model is divided."""
Axes = tuple[str | None, ...]

LOGICAL_AXES: tuple[tuple[str, Axes], ...] = (
    (r"embed_tokens\.embedding", ("vocab", None)),
    (r"lm_head\.kernel", (None, "vocab")),
    (r"self_attn\.q_proj\.kernel", (None, "heads")),
    (r"self_attn\.q_proj\.bias", ("heads",)),
    (r"self_attn\.[kv]_proj\.kernel", (None, "kv_heads")),
    (r"self_attn\.[kv]_proj\.bias", ("kv_heads",)),
    (r"self_attn\.(?:o_proj|out_proj)\.kernel", ("heads", None)),
    (r"mlp\.(?:gate_proj|up_proj|fc1|linear_fc1)\.kernel", (None, "inner")),
    (r"mlp\.(?:gate_proj|up_proj|fc1|linear_fc1)\.bias", ("inner",)),
    (r"mlp\.(?:down_proj|fc2|linear_fc2)\.kernel", ("inner", None)),
)
"""End of a parameter's path to the names of its axes; the first that fits counts."""

MESH_AXES: Mapping[str, str] = {"vocab": MODEL, "heads": MODEL, "kv_heads": MODEL, "inner": MODEL}
"""Logical axis to the mesh's."""


def current_mesh() -> AbstractMesh | None:
    """The mesh for which a program is traced, if it has a ``model`` axis of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.shape.get(MODEL, 1) == 1 else mesh


def model_axis_size() -> int:
    """Devices along ``model``; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[MODEL]


def over_model_axis(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """``function`` of each device's own parts, by `jax.shard_map` over the current mesh."""
    mesh = current_mesh()
    assert mesh is not None, "asked under a mesh alone"
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def whole(tree: Any) -> Any:
    """Arrays that lie whole on every device from here on; as they are without a mesh."""
    return tree if current_mesh() is None else jax.lax.with_sharding_constraint(tree, P())


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[tuple, NamedSharding]:
    """Path of each parameter to where it lies on ``mesh``; whole everywhere where the devices don't divide its axis."""
    devices = mesh.shape[MODEL]
    modules = dict(nnx.iter_modules(model))
    result = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.get_value().shape
        spec = []
        for name, size in zip(_axes(path, len(shape)), shape, strict=True):
            divides = name is not None and _units(name, size, modules.get(path[:-2])) % devices == 0
            spec.append(MESH_AXES[name] if name is not None and divides else None)
        result[path] = NamedSharding(mesh, P(*spec))
    return result


def check_heads(num_heads: int, num_kv_heads: int, devices: int) -> None:
    """Refuse a division of decoder heads that leaves a device without its own.

    Raises:
      ConfigError: ``devices`` divide neither the query heads, nor, one way or the other, the key and value heads.
    """
    if num_heads % devices:
        raise ConfigError(
            f"tensor_parallel_size {devices} does not divide the model's {num_heads} attention heads; "
            f"it may be {_divisors(num_heads)}"
        )
    if num_kv_heads % devices and devices % num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size {devices} neither divides the model's {num_kv_heads} key and value heads nor is a "
            "multiple of them"
        )


def _axes(path: tuple, ndim: int) -> Axes:
    """Names of a parameter's axes; None for one that is not divided."""
    name = ".".join(map(str, path))
    for pattern, axes in LOGICAL_AXES:
        if re.search(rf"(?:^|\.){pattern}$", name):
            return axes
    return (None,) * ndim


def _units(name: str, size: int, parent: Any) -> int:
    """Into how many equal parts an axis may be divided: heads stay whole."""
    if name not in ("heads", "kv_heads"):
        return size
    head_dim = getattr(parent, "head_dim", None)
    return size // head_dim if head_dim else getattr(parent, "num_heads", 1)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
