"""Where parameters lie on a mesh: logical axes by name, and one table from these to the mesh's axes.

Along the mesh axis ``model`` the heads of attention, the inner width of feed-forwards and the vocabulary are divided.
Then a layer needs two sums over the devices, behind the attention's output and behind the feed-forward's, and no
parameter ever moves.

    q, k, v, gate, up   each device has some columns        its own heads and inner rows follow
    o, down             each device has the rows to match   parts of the output, which are summed up
    embeddings, head    each device has a part of the vocabulary

Projectors of two matrices are divided as feed-forwards are. Of a decoder's key and value heads that are fewer than the
devices, each device has the one that its query heads read (`Placement`). What else is not divided has names all the
same: norms, the biases of outputs, patches and positions, and projectors of one matrix, whose rows all need all
of it (Idefics3's ``modality_projection``, PaliGemma's ``linear``, Gemma 3's ``mm_input_projection_weight``, the
``merging_layer`` of Mistral 3).

What encodes media may lie whole instead, so that each device encodes items of its own (`over_items`).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from aphrodite_jax.errors import ConfigError

__all__ = [
    "ENCODER_PARALLEL",
    "LOGICAL_AXES",
    "MESH_AXES",
    "MODEL",
    "Axes",
    "Placement",
    "axes_of_parameters",
    "by_columns",
    "check_heads",
    "column_spec",
    "current_mesh",
    "model_axis_size",
    "over_items",
    "over_model_axis",
    "place_parameters",
    "whole",
    "whole_rows",
]

MODEL = "model"
"""The mesh axis along which one model is divided."""
ENCODER_PARALLEL = ("items", "weights")
"""How media are encoded: by each device items of its own, or by all each item, with their parts of the weights."""
LANGUAGE_MODEL = ("language_model", "model", "lm_head")
"""Parts of a multimodal model, by the first name of their path, that do not encode media. All others do."""
Axes = tuple[str, ...]

_ATTENTION = r"(?:self_attn|attention|attn)"
_FEED_FORWARD = r"(?:mlp|feed_forward)"
_INTO = rf"(?:{_FEED_FORWARD}\.(?:gate_proj|up_proj|fc1|linear_fc1)|multi_modal_projector\.linear_1)"
_OUT_OF = rf"(?:{_FEED_FORWARD}\.(?:down_proj|fc2|linear_fc2)|multi_modal_projector\.linear_2)"
_INTO_MERGER, _OUT_OF_MERGER = (
    rf"(?:merger\.mlp\.{index}|(?:merger|deepstack_merger_list\.\d+)\.{name})"
    for index, name in ((0, "linear_fc1"), (2, "linear_fc2"))
)

LOGICAL_AXES: tuple[tuple[str, Axes], ...] = (
    (r"embed_tokens\.embedding", ("vocab", "width")),
    (r"lm_head\.kernel", ("width", "vocab")),
    (rf"{_ATTENTION}\.q_proj\.kernel", ("width", "heads")),
    (rf"{_ATTENTION}\.q_proj\.bias", ("heads",)),
    (rf"{_ATTENTION}\.[kv]_proj\.kernel", ("width", "kv_heads")),
    (rf"{_ATTENTION}\.[kv]_proj\.bias", ("kv_heads",)),
    (rf"{_ATTENTION}\.(?:o_proj|out_proj|proj|projection_layer)\.kernel", ("heads", "width")),
    (rf"{_ATTENTION}\.(?:o_proj|out_proj|proj|projection_layer)\.bias", ("width",)),
    (r"self_attn\.[qk]_norm\.scale", ("head",)),
    (r"attention\.[qk]_norm\.scale", ("heads",)),  # InternViT norms all heads together
    (rf"(?:{_INTO}|{_INTO_MERGER})\.kernel", ("width", "inner")),
    (rf"(?:{_INTO}|{_INTO_MERGER})\.bias", ("inner",)),
    (rf"(?:{_OUT_OF}|{_OUT_OF_MERGER})\.kernel", ("inner", "width")),
    (rf"(?:{_OUT_OF}|{_OUT_OF_MERGER})\.bias", ("width",)),
    (r"(?:\w*norm\w*|ln_q|ln_pre)\.(?:scale|bias)", ("width",)),
    (r"lambda_[12]", ("width",)),
    (r"(?:patch_embedding|patch_conv|patch_embeddings\.projection|patch_embed\.proj)\.kernel", ("pixels", "width")),
    (r"(?:patch_embedding|patch_conv|patch_embeddings\.projection|patch_embed\.proj)\.bias", ("width",)),
    (r"(?:position_embedding|pos_embed)\.embedding", ("positions", "width")),
    (r"position_embeddings", ("one", "positions", "width")),
    (r"class_embedding|image_newline", ("width",)),
    (r"cls_token", ("one", "one", "width")),
    (r"(?:modality_projection|multi_modal_projector\.linear|patch_merger\.merging_layer)\.kernel", ("width", "width")),
    (r"multi_modal_projector\.linear\.bias", ("width",)),
    (r"mm_input_projection_weight", ("width", "width")),
)
"""End of a parameter's path to the names of its axes; the first that fits counts.

A model class may have such pairs of its own, ``logical_axes``, which are tried before these.
"""

MESH_AXES: Mapping[str, str | None] = {
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "inner": MODEL,
    "width": None,
    "head": None,
    "pixels": None,
    "positions": None,
    "one": None,
}
"""Logical axis to the mesh's; None is not divided."""


def current_mesh() -> AbstractMesh | None:
    """The mesh for which a program is traced, if it has a ``model`` axis of several devices.

    None for what runs on each device by itself: within `over_model_axis` and `over_items`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.shape.get(MODEL, 1) == 1 or MODEL in mesh.manual_axes
    return None if alone else mesh


def model_axis_size() -> int:
    """Devices along ``model``; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[MODEL]


def over_model_axis(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """``function`` of each device's own parts, by `jax.shard_map` over the current mesh."""
    mesh = current_mesh()
    assert mesh is not None, "asked under a mesh alone"
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def over_items(
    function: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    params: Any,
    arrays: Mapping[str, jax.Array],
) -> Mapping[str, jax.Array]:
    """``function(params, arrays)``, of which each device computes its own items, with all of ``params``.

    Axis 0 of ``arrays`` and of what the function gives is that of items, of which none needs another. The devices then
    exchange what they made, so that each has its columns (the last axis) of all items, as with `by_columns`. Items that
    are no multiple of the devices are filled up by zeros, which come to nothing. Without a mesh it is the function
    alone.
    """
    if current_mesh() is None:
        return function(params, arrays)
    count = len(next(iter(arrays.values())))
    padding = -count % model_axis_size()
    filled = {name: jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)]) for name, x in arrays.items()}
    made = over_model_axis(function, (P(), P(MODEL)), P(MODEL))(params, filled)
    return {name: by_columns(x)[: len(x) // (count + padding) * count] for name, x in made.items()}


def whole(tree: Any) -> Any:
    """Arrays that lie whole on every device from here on; as they are without a mesh."""
    return tree if current_mesh() is None else jax.lax.with_sharding_constraint(tree, P())


def by_columns(rows: Float[Array, "*T W"]) -> Float[Array, "*T W"]:
    """Rows of which each device has some columns; whole where the devices don't divide them."""
    if current_mesh() is None:
        return rows
    return jax.lax.with_sharding_constraint(rows, column_spec(rows.shape[-1], model_axis_size(), rows.ndim))


def column_spec(width: int, devices: int, ndim: int = 2) -> P:
    """Where rows of ``width`` columns lie with `by_columns`, the columns being the last of ``ndim`` axes."""
    return P() if width % devices else P(*[None] * (ndim - 1), MODEL)


def whole_rows(rows: Float[Array, "T W"]) -> Float[Array, "T W"]:
    """Rows of which each device computes or keeps some columns, and that lie whole on every one from here on.

    The compiler must be told both: told the second alone, it gathers what they are made of, the output head's matrix or
    the encoder cache, in every step.
    """
    return whole(by_columns(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a parameter lies on a mesh.

    Key and value heads that are fewer than the devices are repeated, each as often as devices need it, and then
    divided. The model computes the same with them, as groups of query heads that share a head become smaller.

    Attributes:
      sharding: of the parameter with its heads repeated.
      repeats: how often each head stands along ``axis``, next to itself.
      head_dim: width of a head along ``axis``; 0 where nothing is repeated.
    """

    sharding: NamedSharding
    repeats: int = 1
    axis: int = 0
    head_dim: int = 0

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of a parameter of ``shape``, with its heads repeated."""
        return tuple(size * self.repeats if i == self.axis else size for i, size in enumerate(shape))

    def values(self, array: np.ndarray) -> np.ndarray:
        """A parameter's numbers with its heads repeated."""
        if self.repeats == 1:
            return array
        by_head = array.reshape(*array.shape[: self.axis], -1, self.head_dim, *array.shape[self.axis + 1 :])
        return by_head.repeat(self.repeats, self.axis).reshape(self.shape(array.shape))

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What one device has of a parameter of ``shape``."""
        return self.sharding.shard_shape(self.shape(shape))


def place_parameters(
    model: nnx.Module, mesh: Mesh | AbstractMesh, encoder_parallel: str = "items"
) -> dict[tuple, Placement]:
    """Path of each parameter to where it lies on ``mesh``; whole everywhere where the devices don't divide its axis.

    Args:
      encoder_parallel: one of `ENCODER_PARALLEL`; with "items" what encodes media lies whole.

    Raises:
      ConfigError: as `axes_of_parameters`; or another ``encoder_parallel``.
    """
    if encoder_parallel not in ENCODER_PARALLEL:
        raise ConfigError(f"encoder_parallel is one of {', '.join(ENCODER_PARALLEL)}, got {encoder_parallel!r}")
    devices = mesh.shape[MODEL]
    modules = dict(nnx.iter_modules(model))
    shapes = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(nnx.state(model))}
    multimodal = getattr(type(model), "supports_multimodal", False)
    result = {}
    for path, axes in axes_of_parameters(model).items():
        encodes = multimodal and path[0] not in LANGUAGE_MODEL
        spec: list[str | None] = [MESH_AXES[name] for name in axes]
        if encoder_parallel == "items" and encodes:
            spec = [None] * len(axes)
        repeated = {}
        for i, (name, size) in enumerate(zip(axes, shapes[path], strict=True)):
            if spec[i] is None:
                continue
            units = _units(name, size, modules.get(path[:-2]))
            if name == "kv_heads" and devices > units and devices % units == 0 and not encodes:
                repeated = {"repeats": devices // units, "axis": i, "head_dim": size // units}
            elif units % devices:
                spec[i] = None
        result[path] = Placement(sharding=NamedSharding(mesh, P(*spec)), **repeated)
    return result


def axes_of_parameters(model: nnx.Module) -> dict[tuple, Axes]:
    """Path of each parameter to the names of its axes, by the model's own ``logical_axes`` and `LOGICAL_AXES`.

    Raises:
      ConfigError: a parameter that no pattern names, or that has another number of axes, or an unknown name.
    """
    table = (*getattr(type(model), "logical_axes", ()), *LOGICAL_AXES)
    found = {}
    problems: dict[str, None] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, shape = ".".join(map(str, path)), variable.get_value().shape
        axes = next((axes for pattern, axes in table if re.search(rf"(?:^|\.)(?:{pattern})$", name)), None)
        of_layers = re.sub(r"\b\d+\b", "*", name)
        if axes is None:
            problems[f"{of_layers} {list(shape)} has no names"] = None
        elif len(axes) != len(shape) or not MESH_AXES.keys() >= set(axes):
            problems[f"{of_layers} {list(shape)} is named {', '.join(axes)}"] = None
        else:
            found[path] = axes
    if problems:
        raise ConfigError(
            f"the axes of these parameters of {type(model).__name__} must have names to be divided over devices: "
            f"{'; '.join(problems)}. Give the class logical_axes, pairs of a pattern for the end of a parameter's path "
            f"and its axes, each one of {', '.join(MESH_AXES)}"
        )
    return found


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


def _units(name: str, size: int, parent: Any) -> int:
    """Into how many equal parts an axis may be divided: heads stay whole."""
    if name not in ("heads", "kv_heads"):
        return size
    if head_dim := getattr(parent, "head_dim", None):
        return size // head_dim
    if num_heads := getattr(parent, "num_heads", None):
        return num_heads
    raise ConfigError(f"{type(parent).__name__} has heads, but neither head_dim nor num_heads tells how many")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
