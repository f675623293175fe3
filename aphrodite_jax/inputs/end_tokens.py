"""Which tokens end an answer."""

from typing import Any

import transformers

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs.tokenizer import optional_file

__all__ = ["end_token_ids"]


def end_token_ids(model_config: ModelConfig, tokenizer=None) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, else the config's, else the tokenizer's.

    Hugging Face's ``generate`` looks in the same order. Empty where none of them names one.

    Raises:
      ConfigError: a generation config that can't be read, or an end token that is no token id.
    """
    generation = _of_generation_config(model_config)
    hf_config = model_config.hf_config
    for found in (
        generation,
        getattr(hf_config, "eos_token_id", None),
        getattr(model_config.hf_text_config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if found is not None:
            tokens = [found] if isinstance(found, int) else found
            if not isinstance(tokens, list | tuple) or not all(isinstance(token, int) for token in tokens):
                raise ConfigError(
                    f"eos_token_id of {model_config.model!r} is a token id or a list of them, got {found!r}"
                )
            return frozenset(tokens)
    return frozenset()


def _of_generation_config(model_config: ModelConfig) -> Any:
    name, revision = model_config.model, model_config.revision
    try:
        if optional_file(name, transformers.utils.GENERATION_CONFIG_NAME, revision) is None:
            return None
        return transformers.GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except Exception as error:  # damaged files come as errors of many types
        raise ConfigError(f"can't read the generation config of {name!r}: {error}") from error
