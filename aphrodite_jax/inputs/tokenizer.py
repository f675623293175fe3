"""The checkpoint's Hugging Face tokenizer."""

import functools
import json
import threading
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.hub import cached_file

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.multimodal.hf_processors import OncePerConfig

__all__ = ["TextTokens", "load_tokenizer", "optional_file", "text_tokens"]


def load_tokenizer(model_config: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of ``model_config.tokenizer``, with the chat template of the checkpoint.

    Raises:
      ConfigError: there is none, or its files can't be read.
    """
    name = model_config.tokenizer
    revision = model_config.revision if name == model_config.model else None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        if not tokenizer.chat_template:
            tokenizer.chat_template = _legacy_chat_template(name, revision)
        return tokenizer
    except Exception as error:  # damaged files come as errors of many types, a bare Exception among them
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"can't load a tokenizer from {name!r}: {type(error).__name__}: {reason[:400]}. Give its directory or hub "
            "id with tokenizer="
        ) from error


class TextTokens:
    """Token ids of texts that a model's input functions add to a prompt; each text is tokenized once.

    A fast tokenizer refuses to serve two threads at a time; this serves any number.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase):
        self.tokenizer: Any = tokenizer
        self._lock = threading.Lock()
        self._kept = functools.lru_cache(maxsize=4096)(self._tokenize)

    def __call__(self, text: str) -> tuple[int, ...]:
        """Its token ids, without special tokens round them."""
        return self._kept(text)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@OncePerConfig
def text_tokens(model_config: ModelConfig) -> TextTokens:
    """Those of the checkpoint's tokenizer."""
    return TextTokens(load_tokenizer(model_config))


def _legacy_chat_template(name: str, revision: str | None) -> str | None:
    """The template of ``chat_template.json``, where processors kept theirs before ``chat_template.jinja``."""
    path = optional_file(name, "chat_template.json", revision)
    return json.loads(path.read_text("utf-8"))["chat_template"] if path else None


def optional_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model directory or hub id; None where it has no such file.

    Raises:
      OSError: the hub can't tell, as when it refuses the request.
    """
    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None
