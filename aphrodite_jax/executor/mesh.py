"""The devices that one model is divided over."""

import jax
import numpy as np
from jax.sharding import Mesh

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.sharding import MODEL

__all__ = ["make_mesh"]


def make_mesh(tensor_parallel_size: int) -> Mesh | None:
    """A mesh with the axis ``model`` over the first devices; None where there is one alone.

    Raises:
      ConfigError: there are fewer devices.
    """
    if tensor_parallel_size == 1:
        return None
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but JAX finds {len(devices)} device"
            f"{'s' * (len(devices) > 1)} ({devices[0].device_kind})"
        )
    return Mesh(np.array(devices[:tensor_parallel_size]), (MODEL,))
