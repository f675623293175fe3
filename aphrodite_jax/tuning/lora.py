"""Low-rank updates of a model's matrices (LoRA, https://arxiv.org/abs/2106.09685), put in place and taken out again.

Where a target ``nnx.Linear`` stood, a `LoRALinear` stands around it:

    q_proj.kernel    becomes    q_proj.base_module.kernel    the matrix, which is not trained
                                q_proj.lora_a, lora_b        A [in, rank], B [rank, out]: `nnx.LoRAParam`, float32

so that ``y = W x + b + (alpha / rank) (x A) B``. B starts at zero: a fresh update changes nothing.
"""

import math
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.errors import ConfigError

__all__ = ["DEFAULT_TARGETS", "LoRALinear", "add_lora", "lora_modules", "merge_lora"]

DEFAULT_TARGETS = r"(?:language_model\.)?model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj"
"""The attention and feed-forward projections of the language model, in every family; of no vision tower."""


class LoRALinear(nnx.LoRA):
    """An ``nnx.Linear`` and its low-rank update.

    The update is computed in the dtype of its input, which is the model's; its parameters are float32 whatever that
    is, so that small steps of an optimizer are not rounded away.
    """

    def __init__(self, linear: nnx.Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        super().__init__(linear.in_features, rank, linear.out_features, base_module=linear, rngs=rngs)
        self.scale = scale

    @property
    def linear(self) -> nnx.Linear:
        """What it stands around."""
        linear = self.base_module
        assert isinstance(linear, nnx.Linear)
        return linear

    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """The product with the matrix and its update."""
        low = x @ self.lora_a[...].astype(x.dtype)
        return self.linear(x) + low @ (self.lora_b[...] * self.scale).astype(x.dtype)

    def merged_kernel(self) -> Float[Array, "in out"]:
        """The matrix with its update added in float32, in the matrix's dtype."""
        kernel = self.linear.kernel[...]
        update = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest") * self.scale
        return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)


def add_lora(
    model: nnx.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str = DEFAULT_TARGETS,
    rngs: nnx.Rngs,
) -> tuple[str, ...]:
    """Put a low-rank update on every ``nnx.Linear`` whose path ``targets`` matches; the model is changed in place.

    Args:
      rank: of each update.
      alpha: updates are scaled by ``alpha / rank``; None takes ``rank``, for a scale of 1.
      targets: a regular expression for whole paths of modules, such as ``language_model.model.layers.0.mlp.up_proj``.
      rngs: its stream ``params`` is drawn from, for A.

    Returns:
      The paths of the modules with an update.

    Raises:
      ConfigError: no Linear matches, a rank or alpha out of range, or the model has LoRA already. Nothing is changed
        then.
    """
    if there := lora_modules(model):
        raise ConfigError(
            f"the model has LoRA already, on {_listed(there)}: call merge_lora first, or load the model again"
        )
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ConfigError(f"targets {targets!r} is no regular expression: {error}") from error
    linears = _modules(model, nnx.Linear)
    chosen = {name: linear for name, linear in linears.items() if pattern.fullmatch(name)}
    if not chosen:
        raise ConfigError(
            f"targets {targets!r} matches no Linear of {type(model).__name__} (whole paths are matched); there are "
            f"{_listed(linears)}"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is a whole number of at least 1, got {rank!r}")
    small = {name: linear for name, linear in chosen.items() if rank > min(linear.in_features, linear.out_features)}
    if small:
        sides = min(min(linear.in_features, linear.out_features) for linear in small.values())
        raise ConfigError(f"rank {rank} is above the smaller side of {_listed(small)}: {sides} at most")
    alpha = float(rank) if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not (0 < alpha < math.inf):
        raise ConfigError(f"alpha is a number above 0, got {alpha!r}")
    for name, linear in chosen.items():
        _replace(model, name, LoRALinear(linear, rank, alpha / rank, rngs=rngs))
    return tuple(chosen)


def merge_lora(model: nnx.Module) -> tuple[str, ...]:
    """Fold every update into its matrix, in place: the tree is what it was before `add_lora`.

    Returns:
      The paths of the modules that had an update.

    Raises:
      ConfigError: the model has none.
    """
    found = lora_modules(model)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no LoRA to merge")
    for name, module in found.items():
        module.linear.kernel.set_value(module.merged_kernel())
        _replace(model, name, module.linear)
    return tuple(found)


def lora_modules(model: nnx.Module) -> dict[str, LoRALinear]:
    """Path to module, for each that `add_lora` put in."""
    return _modules(model, LoRALinear)


def _modules(model: nnx.Module, kind: type) -> dict[str, Any]:
    found = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, kind)}
    # By number where paths have numbers: layer 10 comes behind layer 9.
    ordered = sorted(found, key=lambda path: [(isinstance(key, str), key) for key in path])
    return {".".join(map(str, path)): found[path] for path in ordered}


def _replace(model: nnx.Module, name: str, module: nnx.Module) -> None:
    node: Any = model
    *parents, last = name.split(".")
    for key in parents:
        node = node[int(key)] if isinstance(node, nnx.List) else getattr(node, key)
    if isinstance(node, nnx.List):
        node[int(last)] = module
    else:
        setattr(node, last, module)


def _listed(names) -> str:
    """Paths, those of equal layers once."""
    return ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
