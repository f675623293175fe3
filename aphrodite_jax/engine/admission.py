"""From what a user gave to a checked prompt: tokenize, process, map, check (all on the host).

Whatever goes wrong here, a model author's function included, is the error of this request alone. Several prompts may
be prepared at a time, in threads.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.sequence import MediaItem, PreparedPrompt, num_values
from aphrodite_jax.errors import (
    AphroditeError,
    PlaceholderError,
    PromptTooLongError,
    RegistrationError,
    RequestError,
)
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs, PlacedItem
from aphrodite_jax.modeling.item_rows import RowsPerItem
from aphrodite_jax.modeling.layers.rotary import angles_depend_on_length
from aphrodite_jax.modeling.models.interfaces import MaskSpec, position_axes
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, Video, content_hash
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.outputs import MediaInfo
from kernels_pallas import intervals
from kernels_pallas.intervals import RowIntervals

__all__ = ["Prompt", "PromptPreparer", "map_media", "prompt_intervals", "prompt_positions"]

Prompt = str | Mapping[str, Any]

PROMPT_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data"}


class PromptPreparer:
    """Prepares prompts for one model.

    Args:
      model_config: the model.
      tokenizer: its tokenizer; None where all prompts come as token ids.
      mask_specs: mask kinds of the model's layers.
      rows_per_item: rows that the model makes of mapped items (`ModelRunner.rows_per_item`).
      vocab_size: token ids that the model knows; placeholder tokens may lie outside.
      max_tokens: of a prompt and one token of its answer, what the model and the caches hold.
      max_media_rows: of one prompt, what the encoder cache holds.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer,
        *,
        mask_specs: Mapping[str, MaskSpec],
        rows_per_item: RowsPerItem,
        vocab_size: int,
        max_tokens: int,
        max_media_rows: int,
    ):
        self._model_config = model_config
        self._model_cls: Any = model_class(model_config)
        self._tokenizer = tokenizer
        self._mask_specs = mask_specs
        self._rows_per_item = rows_per_item
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._max_media_rows = max_media_rows
        self._tokenizer_lock = threading.Lock()  # a fast tokenizer refuses to serve two threads
        self._angles_depend_on_length = angles_depend_on_length(model_config.hf_text_config)

    def __call__(self, prompt: Prompt) -> PreparedPrompt:
        """The prepared prompt.

        Raises:
          RequestError: the prompt can't be served; the message says why and what to do.
        """
        try:
            return self._prepare(prompt)
        except RequestError:
            raise
        except AphroditeError as error:
            raise RequestError(str(error)) from error
        except Exception as error:  # a mapper or processor of a model author, or a library below it
            raise RequestError(f"preparing the prompt failed: {type(error).__name__}: {error}") from error

    def _prepare(self, prompt: Prompt) -> PreparedPrompt:
        inputs = self._tokenize(prompt)
        inputs = INPUT_REGISTRY.process_input(self._model_config, inputs)
        token_ids = self._check_tokens(inputs)
        placed = map_media(self._model_config, inputs)
        return PreparedPrompt(
            text=inputs.prompt,
            token_ids=token_ids,
            intervals=prompt_intervals(self._mask_specs, len(token_ids), inputs.placeholders),
            media=self._check_media(inputs, placed),
            positions=prompt_positions(self._model_config, token_ids, placed),
            key_salt=str(len(token_ids)).encode() if self._angles_depend_on_length else b"",
        )

    def _tokenize(self, prompt: Prompt) -> LLMInputs:
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping):
            raise RequestError(f"a prompt is a string or a dict, got {type(prompt).__name__}")
        unknown = set(prompt) - PROMPT_KEYS
        if unknown:
            raise RequestError(
                f"unknown prompt key {', '.join(map(repr, sorted(map(str, unknown))))}; "
                f"there are {', '.join(sorted(PROMPT_KEYS))}"
            )
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if token_ids is None:
            if not isinstance(text, str):
                raise RequestError("a prompt dict needs 'prompt' (text) or 'prompt_token_ids'")
            if self._tokenizer is None:
                raise RequestError("no tokenizer is loaded: give prompt_token_ids")
            with self._tokenizer_lock:
                token_ids = self._tokenizer(text)["input_ids"]
        token_ids = np.asarray(token_ids)
        if token_ids.ndim != 1 or (token_ids.size and token_ids.dtype.kind not in "iu"):
            raise RequestError(f"prompt_token_ids are whole numbers, got {token_ids.dtype}{list(token_ids.shape)}")
        return LLMInputs(
            prompt_token_ids=tuple(token_ids.tolist()),
            prompt=text,
            multi_modal_data=dict(prompt.get("multi_modal_data") or {}),
        )

    def _check_tokens(self, inputs: LLMInputs) -> np.ndarray:
        token_ids = np.asarray(inputs.prompt_token_ids, np.int64)
        if len(token_ids) == 0:
            raise RequestError("the prompt is empty: it has no tokens")
        if len(token_ids) >= self._max_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, media included; at most {self._max_tokens - 1} fit with "
                "one token of an answer: shorten it, or raise max_model_len"
            )
        outside = (token_ids < 0) | (token_ids >= self._vocab_size)
        for ranges in inputs.placeholders.values():
            for span in ranges:
                outside[span.row_tokens] = False
        if outside.any():
            raise RequestError(
                f"token {token_ids[outside][0]} is not in the model's vocabulary of {self._vocab_size}; "
                "was the prompt made with another tokenizer?"
            )
        return token_ids.astype(np.int32)

    def _check_media(self, inputs: LLMInputs, placed: Sequence[PlacedItem]) -> tuple[MediaItem, ...]:
        total = sum(item.placeholder.num_rows for item in placed)
        if total > self._max_media_rows:
            raise RequestError(
                f"the media take {total} rows, the encoder cache has {self._max_media_rows}: raise encoder_cache_tokens"
            )
        contents = {
            place: item
            for modality, items in inputs.multi_modal_data.items()
            for place, item in zip(inputs.placeholders[modality], items, strict=True)
        }
        return tuple(self._check_item(item, contents[item.placeholder]) for item in placed)

    def _check_item(self, item: PlacedItem, content: Any) -> MediaItem:
        assert item.mm_kwargs is not None, "mapped here"
        modality, placeholder, mm_kwargs = item.modality, item.placeholder, item.mm_kwargs
        options = self._model_config.mm_processor_kwargs
        embeds, size = None, num_values(mm_kwargs)
        if set(mm_kwargs) == {f"{modality}_embeds"}:
            embeds = mm_kwargs[f"{modality}_embeds"].reshape(-1, mm_kwargs[f"{modality}_embeds"].shape[-1])
            rows = len(embeds)
        else:
            rows = sum(self._rows_per_item(mm_kwargs).get(modality, ()))
            mm_kwargs = self._model_cls.pad_media(self._model_config.hf_config, mm_kwargs)
        if rows != placeholder.num_rows:
            raise PlaceholderError(
                f"the prompt holds {placeholder.num_rows} tokens for the {modality} item at token "
                f"{placeholder.offset}, the model makes {rows} rows of it"
            )
        return MediaItem(
            modality=modality,
            content_hash=content_hash(content, {"modality": modality, **options}),
            placeholder=placeholder,
            info=MediaInfo(
                modality=modality,
                offset=placeholder.offset,
                num_tokens=placeholder.length,
                num_rows=placeholder.num_rows,
                frame_indices=content.frame_indices if isinstance(content, Video) else None,
                timestamps=content.timestamps if isinstance(content, Video) else None,
            ),
            mm_kwargs=None if embeds is not None else mm_kwargs,
            num_values=size,
            embeds=embeds,
        )


def map_media(model_config: ModelConfig, inputs: LLMInputs) -> tuple[PlacedItem, ...]:
    """What the mappers make of the items of processed inputs, in the order of their places.

    Raises:
      RegistrationError: the mappers of two modalities give one keyword.
    """
    placed, keywords = [], {}
    for modality, items in inputs.multi_modal_data.items():
        for item, placeholder in zip(items, inputs.placeholders[modality], strict=True):
            mapped = MULTIMODAL_REGISTRY.map_items(model_config, modality, [item])
            arrays = {name: np.asarray(array) for name, array in mapped.items()}
            keywords.setdefault(modality, set()).update(arrays)
            placed.append(PlacedItem(modality=modality, placeholder=placeholder, mm_kwargs=arrays))
    MULTIMODAL_REGISTRY.check_keywords(model_config, keywords)
    return tuple(sorted(placed, key=lambda item: item.placeholder.offset))


def prompt_positions(
    model_config: ModelConfig, token_ids: np.ndarray, placed: Sequence[PlacedItem]
) -> np.ndarray | None:
    """Positions ``[axes, T]`` of a whole prompt for a model that has several axes of them, else None.

    Raises:
      RegistrationError: the model gave something else.
    """
    model_cls: Any = model_class(model_config)
    axes = position_axes(model_cls)
    if axes == 1:
        return None
    positions = np.asarray(model_cls.prompt_positions(model_config.hf_config, token_ids, placed))
    if positions.shape != (axes, len(token_ids)) or positions.dtype.kind != "i":
        raise RegistrationError(
            f"{model_cls.__name__}.prompt_positions gave {positions.dtype}{list(positions.shape)} for "
            f"{len(token_ids)} tokens; expected whole numbers [{axes}, {len(token_ids)}]"
        )
    return positions.astype(np.int32)


def prompt_intervals(
    mask_specs: Mapping[str, MaskSpec], length: int, placeholders: Mapping[str, Sequence]
) -> dict[str, RowIntervals]:
    """Row intervals of a whole prompt for each mask kind."""
    result = {}
    for kind, spec in mask_specs.items():
        is_row = np.zeros(length, bool)
        for placeholder in (r for modality in spec.bidirectional for r in placeholders.get(modality, ())):
            is_row[placeholder.row_tokens] = True
        rows = intervals.causal(length, window=spec.window)
        rows = intervals.bidirectional_spans(rows, intervals.runs(is_row), clamp_start=spec.clamp_start)
        result[kind] = intervals.prefix(rows, length) if spec.prefix else rows
    return result
