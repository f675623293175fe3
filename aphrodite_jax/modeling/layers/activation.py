"""Activation functions by the names that Hugging Face configs use."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from aphrodite_jax.errors import ConfigError

__all__ = ["activation"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(x * jnp.asarray(1.702, x.dtype)),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function called ``name``.

    Raises:
      ConfigError: no function has this name.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported; there are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
