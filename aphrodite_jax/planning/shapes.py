"""A model without weights, on devices that need not be there."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.model_programs import device_bytes
from aphrodite_jax.modeling.loader.load import abstract_model, resolve_dtype
from aphrodite_jax.modeling.sharding import MODEL, place_parameters
from aphrodite_jax.multimodal.context import model_class

__all__ = ["model_on", "weight_bytes", "whole_model"]


def whole_model(model_config: ModelConfig) -> Any:
    """The model with shapes in the place of its parameters, from its config alone.

    Raises:
      ConfigError: neither ``dtype`` nor the config says in which dtype.
    """
    config = model_config.hf_config
    told = any(getattr(x, "dtype", None) is not None for x in (config, model_config.hf_text_config))
    if model_config.dtype == "auto" and not told:
        raise ConfigError(f"the config of {model_config.model!r} tells no dtype: give dtype, 'bfloat16' say")
    return abstract_model(model_class(model_config), config, resolve_dtype(model_config))


def model_on(model: Any, mesh: Mesh | AbstractMesh, encoder_parallel: str) -> Any:
    """``model`` with its shapes laid on a mesh as the engine lays its weights."""
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    for path, place in place_parameters(model, mesh, encoder_parallel).items():
        value = variables[path].get_value()
        shape = jax.ShapeDtypeStruct(place.shape(value.shape), value.dtype, sharding=place.sharding)
        variables[path] = variables[path].replace(shape)
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def weight_bytes(model: Any, devices: int, encoder_parallel: str) -> int:
    """Bytes of the weights on one of ``devices`` that the model is divided over."""
    on_devices = model_on(model, AbstractMesh((devices,), (MODEL,)), encoder_parallel)
    return device_bytes(nnx.state(on_devices))
