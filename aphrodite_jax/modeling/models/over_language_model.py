"""What models share that put the rows of a vision tower among the embeddings of a language model."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aphrodite_jax.architectures import resolve_architecture
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.models.interfaces import MaskSpec, SupportsMultiModal

__all__ = ["OverLanguageModel"]


class OverLanguageModel(nnx.Module, SupportsMultiModal):
    """A multimodal model with a language model of its own class: ``language_model``, made by `make_language_model`.

    Class attributes:
      family: the model's name in messages.
      language_models: ``model_type`` of a ``text_config`` to the architecture that serves it.
    """

    family: ClassVar[str]
    language_models: ClassVar[Mapping[str, str]]
    language_model: Any
    config: Any

    @classmethod
    def language_model_class(cls, config) -> Any:
        """The class of the language model that the config names.

        Raises:
          ConfigError: there is none.
        """
        kind = config.text_config.model_type
        if kind not in cls.language_models:
            raise ConfigError(
                f"{cls.family} with a language model {kind!r} is not supported; there are "
                f"{', '.join(cls.language_models)}"
            )
        return resolve_architecture([cls.language_models[kind]])

    def make_language_model(self, config, *, tied: bool, dtype, rngs: nnx.Rngs) -> Any:
        """The language model; ``tied`` says whether its output head is its embeddings, whatever its own config says."""
        text_config = copy.deepcopy(config.text_config)
        text_config.tie_word_embeddings = tied
        return self.language_model_class(config)(text_config, dtype=dtype, rngs=rngs)

    @classmethod
    def mask_specs(cls, config) -> dict[str, MaskSpec]:
        """Those of the language model: media are plain tokens to it."""
        return cls.language_model_class(config).mask_specs(config.text_config)

    @classmethod
    def kv_cache_shapes(cls, config) -> tuple[tuple[int, int], ...]:
        """Those of the language model."""
        return cls.language_model_class(config).kv_cache_shapes(config.text_config)

    def embed_input_ids(self, input_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token embeddings; ids past the vocabulary (an image token may be one) give some row, to be replaced."""
        return self.language_model.embed_input_ids(jnp.minimum(input_ids, self.config.text_config.vocab_size - 1))

    def final_norm(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The norm behind the language model's last layer."""
        return self.language_model.final_norm(hidden_states)

    def compute_logits(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Next-token logits, in float32."""
        return self.language_model.compute_logits(hidden_states)
