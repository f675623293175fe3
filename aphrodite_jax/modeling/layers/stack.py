"""Layers of one structure, traced once.

A program of thirty equal layers is traced and lowered for one of them: inside another trace a jitted function is
looked up by the structure and shapes of what it gets, and XLA inlines it wherever it is called.
"""

import functools
from typing import Any

import jax
from flax import nnx

__all__ = ["call_layer"]


def call_layer(layer: nnx.Module, *args: Any) -> Any:
    """``layer(*args)`` for one layer of a stack; ``args`` and the result are trees of arrays.

    What the call would change in the layer itself is lost.
    """
    graphdef, state = nnx.split(layer)
    return _call(graphdef, state, args)


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef, state, args):
    return nnx.merge(graphdef, state)(*args)
