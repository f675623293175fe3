"""A tiny model of an architecture that ships, and the parts that many of them have."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from hypothesis.strategies import SearchStrategy

from aphrodite_jax.architectures import resolve_architecture
from aphrodite_jax.testing.tokenizers import byte_tokenizer

__all__ = ["FIRST_SPECIAL", "LLAMA", "TEXT", "TOWER", "TinyModel", "processor_file", "special_tokens", "tiny_model"]

FIRST_SPECIAL, VOCAB_SIZE = 259, 272
"""Of the ids of `byte_tokenizer`'s special tokens, and all ids, of which the last stand for nothing."""
TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
"""Of every language model."""
LLAMA: Mapping[str, Any] = {"model_type": "llama", **TEXT}
TOWER: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 28,
    "patch_size": 14,
}
"""Of most vision towers: four patches an image or tile."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TinyModel:
    """An architecture as small as it gets, and all that its checkpoint's directory holds beside weights.

    Attributes:
      architecture: its key in the table of architectures.
      model_cls: the class that serves it.
      config: its config, of one or two million bytes of weights at most.
      traits: what sets it apart, in a few words each.
      files: JSON files of the checkpoint by name, of processors.
      tokenizer: one token a byte, and those that the model's processor wants.
      placeholders: modality to the token that stands for an item in a prompt, where the config does not tell it.
      strategies: modality to a strategy of items; they are small, and of every shape that matters.
    """

    architecture: str
    model_cls: type
    config: transformers.PretrainedConfig
    traits: tuple[str, ...]
    files: Mapping[str, Any]
    tokenizer: transformers.PreTrainedTokenizerBase
    placeholders: Mapping[str, int]
    strategies: Mapping[str, SearchStrategy]

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of `check_multimodal_model`."""
        names = ("files", "tokenizer", "placeholders", "strategies")
        return {name: getattr(self, name) for name in names}


def special_tokens(*texts: str) -> dict[str, int]:
    """The ids that `byte_tokenizer` gives these tokens."""
    return {text: FIRST_SPECIAL + index for index, text in enumerate(texts)}


def tiny_model(
    architecture: str,
    config: Mapping[str, Any],
    *,
    traits: Sequence[str],
    tokens: Mapping[str, int],
    strategies: Mapping[str, SearchStrategy],
    files: Mapping[str, Any],
    placeholders: Mapping[str, int] | None = None,
) -> TinyModel:
    """A `TinyModel` from plain values; ``config`` is what ``config.json`` holds, but for what is told here."""
    name, _, tower = architecture.partition("/")
    fields = dict(config) | {"architectures": [name], "dtype": "float32", "tie_word_embeddings": False}
    fields["text_config"] = dict(config["text_config"]) | {"vocab_size": VOCAB_SIZE}
    return TinyModel(
        architecture=architecture,
        model_cls=resolve_architecture([name], tower=tower or None),
        config=transformers.AutoConfig.for_model(fields.pop("model_type"), **fields),
        traits=tuple(traits),
        files=files,
        tokenizer=byte_tokenizer(list(tokens)),
        placeholders=placeholders or {},
        strategies=strategies,
    )


def processor_file(kind: str, **options: Any) -> dict[str, Any]:
    """``preprocessor_config.json`` of an image processor that scales pixels to [-1, 1]."""
    usual = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return {"preprocessor_config.json": {"image_processor_type": kind, **usual, **options}}
