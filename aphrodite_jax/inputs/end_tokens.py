"""Which tokens end an answer."""

import transformers

from aphrodite_jax.config import ModelConfig

__all__ = ["end_token_ids"]


def end_token_ids(model_config: ModelConfig, tokenizer=None) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, else the config's, else the tokenizer's.

    Hugging Face's ``generate`` looks in the same order. Empty where none of them names one.
    """
    try:
        generation = transformers.GenerationConfig.from_pretrained(
            model_config.model, revision=model_config.revision
        ).eos_token_id
    except OSError:  # the file is optional
        generation = None
    hf_config = model_config.hf_config
    for found in (
        generation,
        getattr(hf_config, "eos_token_id", None),
        getattr(model_config.hf_text_config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
