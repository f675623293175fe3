"""What a model's input functions may know, and which model class that is."""

import dataclasses
from typing import TypeVar

import transformers

from aphrodite_jax.architectures import resolve_architecture
from aphrodite_jax.config import ModelConfig

__all__ = ["InputContext", "class_of_config", "model_class"]

ConfigT = TypeVar("ConfigT", bound=transformers.PretrainedConfig)


@dataclasses.dataclass(frozen=True)
class InputContext:
    """What a model's input functions may know."""

    model_config: ModelConfig

    def get_hf_config(self, hf_config_type: type[ConfigT] = transformers.PretrainedConfig) -> ConfigT:
        """The Hugging Face config, checked to be of ``hf_config_type``.

        Raises:
          TypeError: it is of another type.
        """
        config = self.model_config.hf_config
        if not isinstance(config, hf_config_type):
            raise TypeError(f"expected a {hf_config_type.__name__}, the model has a {type(config).__name__}")
        return config


def model_class(model_config: ModelConfig) -> type:
    """The class that serves the checkpoint's architecture."""
    return class_of_config(model_config.hf_config, source=f"the config of {model_config.model!r}")


def class_of_config(config: transformers.PretrainedConfig, *, source: str = "the config") -> type:
    """The class for the architecture that a config names, over its vision tower.

    Raises:
      UnknownArchitectureError: as `resolve_architecture`.
    """
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return resolve_architecture(config.architectures, tower=tower, source=source)
