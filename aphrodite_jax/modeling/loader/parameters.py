"""The parameters of a model under the names and in the axes of a checkpoint.

The module tree mirrors the checkpoint's names but for the last part, which the kind of module decides:

    module          parameter   checkpoint   axes there
    nnx.Linear      kernel      weight       transposed: [out, in]
    nnx.Conv        kernel      weight       [out, in, *spatial]
    PatchEmbed      kernel      weight       those of the convolution: [D, C, p, p]
    nnx.Embed       embedding   weight       the same
    norms           scale       weight       the same
    any other       its name    its name     the same

Projections that a checkpoint has as one matrix are modules of their own here, so that each can be divided over devices.
The module around them tells: ``joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}`` says that the tensor
``qkv_proj.weight`` is the rows of the three, one behind another. The same goes for their biases.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.layers.embedding import PatchEmbed

__all__ = ["Parameter", "WantedTensor", "wanted_tensors"]

Layout = Callable[[nnx.Module, np.ndarray], np.ndarray]
"""An array of ours as a view in the checkpoint's axes: written through to load, read to save."""


def _same(module, array):
    return array


def _transposed(module, array):
    return array.T


def _convolution(module, array):
    *spatial, fan_in, fan_out = range(array.ndim)
    return array.transpose(fan_out, fan_in, *spatial)


def _patches(module, array):
    return array.T.reshape(module.conv_shape)  # splitting an axis never copies


KINDS: tuple[tuple[type | tuple[type, ...], dict[str, tuple[str, Layout]]], ...] = (
    (PatchEmbed, {"kernel": ("weight", _patches)}),
    (nnx.Linear, {"kernel": ("weight", _transposed)}),
    (nnx.Conv, {"kernel": ("weight", _convolution)}),
    (nnx.Embed, {"embedding": ("weight", _same)}),
    ((nnx.LayerNorm, nnx.RMSNorm), {"scale": ("weight", _same)}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model.

    Attributes:
      path: where it stands in the nnx state.
      value: the array, or its shape and dtype in an abstract model.
      shape: its shape in the checkpoint.
      view: an array of ours as a view in the checkpoint's axes.
    """

    path: tuple[str | int, ...]
    value: jax.Array | jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    view: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedTensor:
    """A tensor that a checkpoint must have for a model.

    Attributes:
      parts: the parameter that it fills; of joined projections each, whose rows stand one behind another.
      is_embedding: whether it is the table of an `nnx.Embed`.
    """

    parts: tuple[Parameter, ...]
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else (sum(part.shape[0] for part in self.parts), *first[1:])

    @property
    def dtype(self) -> np.dtype:
        """Of its parts."""
        return self.parts[0].value.dtype


def wanted_tensors(model: nnx.Module) -> dict[str, WantedTensor]:
    """Tensors by dotted checkpoint name, for a real model or an abstract one (`nnx.eval_shape`).

    Raises:
      CheckpointError: the model keeps state that is no `nnx.Param`, which no checkpoint could fill.
    """
    modules = dict(nnx.iter_modules(model))
    found: dict[str, list[tuple[int, Parameter]]] = {}
    embeddings = set()
    foreign = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Param):
            foreign.append(f"{'.'.join(map(str, path))} ({type(variable).__name__})")
            continue
        module = modules.get(path[:-1])
        leaf, parameter = _parameter(module, path, variable.get_value())
        *parents, place = _joined_path(path[:-1], modules)
        name = ".".join([*map(str, parents), leaf])
        found.setdefault(name, []).append((place, parameter))
        if isinstance(module, nnx.Embed):
            embeddings.add(name)
    if foreign:
        raise CheckpointError(
            f"{type(model).__name__} keeps state that no checkpoint has: {', '.join(foreign)}. Compute it "
            "when the model is called, or make it an nnx.Param"
        )
    return {
        name: WantedTensor(
            parts=tuple(parameter for _, parameter in sorted(parts, key=lambda part: part[0])),
            is_embedding=name in embeddings,
        )
        for name, parts in found.items()
    }


def _parameter(module, path, value) -> tuple[str, Parameter]:
    """Its last name in the checkpoint, and the parameter."""
    leaf, layout = str(path[-1]), _same
    for kind, leaves in KINDS:
        if isinstance(module, kind):
            leaf, layout = leaves.get(leaf, (leaf, _same))
            break
    view = functools.partial(layout, module)
    # A view of zero strides has the shape without the memory.
    shape = view(np.broadcast_to(np.zeros((), np.bool_), value.shape)).shape
    return leaf, Parameter(path=path, value=value, shape=shape, view=view)


def _joined_path(path: tuple, modules: Mapping[tuple, nnx.Module]) -> tuple:
    """The path of a module in the checkpoint, and its place among the projections that stand there."""
    joined = getattr(modules.get(path[:-1]), "joined", {}) if path else {}
    for name, parts in joined.items():
        if path[-1] in parts:
            return *path[:-1], name, parts.index(path[-1])
    return *path, 0
