"""Layers of one structure, traced once; many items, a few at a time.

A program of thirty equal layers is traced and lowered for one of them: inside another trace a jitted function is
looked up by the structure and shapes of what it gets, and XLA inlines it wherever it is called.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.modeling.layers.observer import current_observer

__all__ = ["call_layer", "in_parts"]


def call_layer(layer: nnx.Module, *args: Any) -> Any:
    """``layer(*args)`` for one layer of a stack; ``args`` and the result are trees of arrays.

    What the call would change in the layer itself is lost.
    """
    observer = current_observer()
    if observer is not None:  # what it sees must not stay behind in a trace of its own
        return observer.call(layer, args)
    graphdef, state = nnx.split(layer)
    return _call(graphdef, state, args)


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef, state, args):
    return nnx.merge(graphdef, state)(*args)


def in_parts(
    function: Callable[[Float[Array, "..."]], Float[Array, "..."]], x: Float[Array, "items ..."], size: int
) -> Float[Array, "items ..."]:
    """``function`` of the items of ``x``, ``size`` of them at a time, so that it takes the memory of so many alone."""
    whole = len(x) // size * size
    if whole == 0 or len(x) == size:
        return function(x)
    made = jax.lax.map(function, x[:whole].reshape(-1, size, *x.shape[1:]))
    made = made.reshape(whole, *made.shape[2:])
    return made if whole == len(x) else jnp.concatenate([made, function(x[whole:])])
