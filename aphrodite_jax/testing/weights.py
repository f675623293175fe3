"""A model with random weights, without a program for each of its parameters."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from aphrodite_jax.testing.programs import fast_options

__all__ = ["random_weights"]


def random_weights(model_cls: Any, hf_config: transformers.PretrainedConfig, seed: int = 0) -> tuple[Any, Any]:
    """Graph and state of a float32 model: what its constructor draws is drawn here, the rest is as built.

    Initializers that draw take a program for each shape, and a program takes longer to compile than a tiny model to
    run. So numbers that depend on the constructor's key are NumPy's, normal, with a variance of one over the numbers
    that a weight sums up (all axes but the last; of a vector its own length). Zeros, ones and the like stay.
    """
    graphdef: Any = None

    def build(key):
        nonlocal graphdef
        graphdef, state = nnx.split(model_cls(hf_config, dtype=jnp.float32, rngs=nnx.Rngs(key)))
        return state

    closed, shapes = jax.make_jaxpr(build, return_shape=True)(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [
        depends and jnp.issubdtype(x.dtype, jnp.floating)
        for x, depends in zip(leaves, _depend_on_input(closed.jaxpr), strict=True)
    ]

    def built():
        state = build(jax.random.key(seed))
        return [x for x, is_drawn in zip(jax.tree.leaves(state), drawn, strict=True) if not is_drawn]

    others, rng = iter(jax.jit(built, compiler_options=fast_options())()), np.random.default_rng(seed)
    values = [_normal(rng, x.shape) if is_drawn else next(others) for x, is_drawn in zip(leaves, drawn, strict=True)]
    return graphdef, jax.tree.unflatten(structure, values)


def _depend_on_input(jaxpr: Any) -> Iterator[bool]:
    """For each output, whether any input has a part in it."""
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(x, "val") and x in reached for x in equation.invars):
            reached |= set(equation.outvars)
    return (not hasattr(x, "val") and x in reached for x in jaxpr.outvars)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    summed = np.prod(shape[:-1] or shape)
    return jnp.asarray((rng.standard_normal(shape) / np.sqrt(summed)).astype(np.float32))
