"""A trained model as a checkpoint of its own, with the files that prompts need."""

import os
import shutil
from pathlib import Path

from flax import nnx

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import load_tokenizer
from aphrodite_jax.inputs.tokenizer import optional_file
from aphrodite_jax.modeling.loader import save_pretrained
from aphrodite_jax.tuning.lora import lora_modules, merge_lora

__all__ = ["save_merged"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Beside those that the tokenizer's class names."""
MODEL_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def save_merged(model: nnx.Module, model_config: ModelConfig, directory: str | os.PathLike) -> None:
    """Write a model with its LoRA merged as a Hugging Face checkpoint that `LLM` and transformers load.

    Weights keep their dtype; the tokenizer, processor and chat template are the files of the source. The model stays
    as it is. What is there of an earlier checkpoint in ``directory`` is replaced.

    Args:
      model: with or without LoRA.
      model_config: the config that it was loaded with; its ``hf_overrides`` become part of ``config.json``.

    Raises:
      ConfigError: ``directory`` is the source's.
      OSError: the directory can't be written, or the source's files can't be read.
    """
    directory = Path(directory).expanduser()
    for source in (model_config.model, model_config.tokenizer):
        if directory.exists() and Path(source).exists() and directory.samefile(source):
            raise ConfigError(f"{directory} is the directory that the model was loaded from: give another one")
    directory.mkdir(parents=True, exist_ok=True)
    own = load_tokenizer(model_config).vocab_files_names.values()
    for name in dict.fromkeys([*TOKENIZER_FILES, *own]):
        _copy(model_config.tokenizer, name, model_config, directory)
    for name in MODEL_FILES:
        _copy(model_config.model, name, model_config, directory)
    if lora_modules(model):
        model = nnx.clone(model)  # other variables over the same arrays
        merge_lora(model)
    save_pretrained(model, model_config.hf_config, directory)


def _copy(source: str, name: str, model_config: ModelConfig, directory: Path) -> None:
    """The file as the source has it; none where it has none."""
    path = optional_file(source, name, model_config.revision if source == model_config.model else None)
    if path is None:
        (directory / name).unlink(missing_ok=True)
    else:
        shutil.copyfile(path, directory / name)
