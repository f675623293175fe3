"""Prompts with the answers to learn, made ready by the functions that serve prompts.

A prompt is tokenized, processed, mapped and checked as any request (`aphrodite_jax.engine.admission`); the answer's
tokens stand behind it as if the model had just said them, with the intervals and positions that they would have then.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import PromptPreparer
from aphrodite_jax.engine.sequence import MediaItem
from aphrodite_jax.errors import ConfigError, RequestError
from aphrodite_jax.inputs import end_token_ids, load_tokenizer, render_chat, text_tokens
from aphrodite_jax.modeling.item_rows import rows_counter
from aphrodite_jax.modeling.models.interfaces import supports_multimodal
from aphrodite_jax.multimodal.context import model_class
from kernels_pallas.intervals import RowIntervals

__all__ = ["Example", "ExamplePreparer", "PreparedExample", "tokens_behind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and the answer to learn.

    Attributes:
      prompt: text; token ids; or a conversation for the model's chat template, as `LLM.chat` takes it.
      answer: text as it follows the prompt, with the space before its first word where there is one; or token ids. A
        token that ends the answer is put behind it.
      multi_modal_data: as in a prompt of `LLM.generate`; in a conversation, media stand in its messages.
      end_token: text of the token that ends the answer, one of those that end answers when the model is served; None
        takes the tokenizer's own, if it is one of them.
    """

    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    answer: str | Sequence[int]
    multi_modal_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    end_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedExample:
    """A checked example: the rows that the model computes of it, one for each token but the last.

    Attributes:
      tokens: of prompt and answer, with the token that ends it.
      prompt_length: tokens of the prompt.
      positions: ``[T]``, or ``[axes, T]`` where the model has several axes of them.
      intervals: mask kind to row intervals ``[T]``.
      media: items in the order of their places.
      encoded_rows: rows that encoding each item gives, those of padding included.
    """

    tokens: Int[np.ndarray, " T+1"]
    prompt_length: int
    positions: np.ndarray
    intervals: Mapping[str, RowIntervals]
    media: tuple[MediaItem, ...]
    encoded_rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows to compute."""
        return len(self.tokens) - 1

    @property
    def num_answers(self) -> int:
        """Tokens that count in the loss: the answer's, and the one that ends it."""
        return len(self.tokens) - self.prompt_length


class ExamplePreparer:
    """Prepares examples for one model.

    Args:
      model: for the shapes of what it encodes; nothing is computed.
      model_config: the config that it was loaded with.

    Raises:
      ConfigError: the model is of another class than the config's.
    """

    def __init__(self, model: nnx.Module, model_config: ModelConfig):
        model_cls: Any = model_class(model_config)
        if not isinstance(model, model_cls):
            raise ConfigError(
                f"the model is a {type(model).__name__}, {model_config.model!r} has a {model_cls.__name__}: give the "
                "config that the model was loaded with"
            )
        self._model_config = model_config
        self._tokenizer = load_tokenizer(model_config)
        self._text_tokens = text_tokens(model_config)
        self._end_tokens = end_token_ids(model_config, self._tokenizer)
        self._mask_specs = model_cls.mask_specs(model_config.hf_config)
        self._encoded_rows = rows_counter(model) if supports_multimodal(model_cls) else (lambda mm_kwargs: {})
        self._prepare = PromptPreparer(
            model_config,
            self._tokenizer,
            mask_specs=self._mask_specs,
            rows_per_item=self._encoded_rows,
            vocab_size=model_config.hf_text_config.vocab_size,
            max_tokens=model_config.context_length,
            max_media_rows=sys.maxsize,
        )

    def __call__(self, example: Example) -> PreparedExample:
        """The prepared example.

        Raises:
          RequestError: it can't be used; the message says why.
        """
        prompt = self._prepare(self._prompt_of(example))
        answer = [*self._answer_tokens(example), self._end_token(example)]
        rows, limit = len(prompt.token_ids) + len(answer) - 1, self._model_config.context_length
        if rows > limit:
            raise RequestError(f"prompt and answer have {rows} tokens, the model takes {limit}: shorten them")
        positions = prompt.positions_of(0, rows)
        return PreparedExample(
            tokens=np.concatenate([prompt.token_ids, np.array(answer, np.int32)]),
            prompt_length=len(prompt.token_ids),
            positions=np.arange(rows, dtype=np.int32) if positions is None else positions,
            intervals=prompt.intervals_of(self._mask_specs, 0, rows),
            media=prompt.media,
            encoded_rows=tuple(map(self._rows_of, prompt.media)),
        )

    def _prompt_of(self, example: Example) -> dict[str, Any]:
        prompt, media = example.prompt, example.multi_modal_data
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            if media:
                raise RequestError("the media of a conversation stand in its messages, not in multi_modal_data")
            return render_chat(prompt, self._tokenizer, self._model_config)  # pyright: ignore[reportArgumentType]
        return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "multi_modal_data": media}

    def _answer_tokens(self, example: Example) -> Sequence[int]:
        answer = example.answer
        if isinstance(answer, str):
            answer = tokens_behind(self._text_tokens, answer)
        vocab_size = self._model_config.hf_text_config.vocab_size
        if not all(isinstance(token, int | np.integer) and 0 <= token < vocab_size for token in answer):
            raise RequestError(f"an answer is text or token ids below {vocab_size}, got {answer!r}")
        if not len(answer):
            raise RequestError(f"the answer {example.answer!r} has no tokens")
        return answer

    def _end_token(self, example: Example) -> int:
        allowed = {int(token): self._tokenizer.convert_ids_to_tokens(int(token)) for token in sorted(self._end_tokens)}
        if example.end_token is not None:
            found = [token for token, text in allowed.items() if text == example.end_token]
        else:
            own: Any = self._tokenizer.eos_token_id
            found = [own] if own in allowed else list(allowed)
        if len(found) != 1:
            raise RequestError(
                f"end_token {example.end_token!r} is none of the tokens that end an answer of this model: give one of "
                f"{', '.join(map(repr, allowed.values()))}"
            )
        return found[0]

    def _rows_of(self, item: MediaItem) -> int:
        if item.mm_kwargs is None:
            return item.placeholder.num_rows  # given as rows
        return sum(self._encoded_rows(item.mm_kwargs)[item.modality])


def tokens_behind(tokens: Callable[[str], tuple[int, ...]], text: str) -> tuple[int, ...]:
    """The tokens of a text that stands behind another.

    A SentencePiece tokenizer puts a space before a text of its own; behind a line's end, the text has what is written.
    """
    line_end, behind = tokens("\n"), tokens("\n" + text)
    return behind[len(line_end) :] if behind[: len(line_end)] == line_end else tokens(text)
