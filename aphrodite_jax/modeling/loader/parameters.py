"""The parameters of a model under the names and in the axes of a checkpoint.

The module tree mirrors the checkpoint's names but for the last part, which the kind of module decides:

    module          parameter   checkpoint   axes there
    nnx.Linear      kernel      weight       transposed: [out, in]
    nnx.Conv        kernel      weight       [out, in, *spatial]
    PatchEmbed      kernel      weight       those of the convolution: [D, C, p, p]
    nnx.Embed       embedding   weight       the same
    norms           scale       weight       the same
    any other       its name    its name     the same
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.layers.embedding import PatchEmbed

__all__ = ["Parameter", "parameters"]

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
      is_embedding: whether it is the table of an `nnx.Embed`.
    """

    path: tuple[str | int, ...]
    value: jax.Array | jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    view: Callable[[np.ndarray], np.ndarray]
    is_embedding: bool


def parameters(model: nnx.Module) -> dict[str, Parameter]:
    """Dotted checkpoint name to parameter, for a real model or an abstract one (`nnx.eval_shape`).

    Raises:
      CheckpointError: the model keeps state that is no `nnx.Param`, which no checkpoint could fill.
    """
    modules = dict(nnx.iter_modules(model))
    found = {}
    foreign = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Param):
            foreign.append(f"{'.'.join(map(str, path))} ({type(variable).__name__})")
            continue
        name, parameter = _parameter(modules.get(path[:-1]), path, variable.get_value())
        found[name] = parameter
    if foreign:
        raise CheckpointError(
            f"{type(model).__name__} keeps state that no checkpoint has: {', '.join(foreign)}. Compute it "
            "when the model is called, or make it an nnx.Param"
        )
    return found


def _parameter(module, path, value) -> tuple[str, Parameter]:
    leaf, layout = str(path[-1]), _same
    for kind, leaves in KINDS:
        if isinstance(module, kind):
            leaf, layout = leaves.get(leaf, (leaf, _same))
            break
    view = functools.partial(layout, module)
    # A view of zero strides has the shape without the memory.
    shape = view(np.broadcast_to(np.zeros((), np.bool_), value.shape)).shape
    name = ".".join([*map(str, path[:-1]), leaf])
    is_embedding = isinstance(module, nnx.Embed)
    return name, Parameter(path=path, value=value, shape=shape, view=view, is_embedding=is_embedding)
