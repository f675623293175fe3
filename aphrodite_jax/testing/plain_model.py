"""A model under test with random weights, called without an engine, and few programs for it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aphrodite_jax.engine.admission import map_media, prompt_intervals, prompt_positions
from aphrodite_jax.inputs import LLMInputs
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, content_hash, embedding_rows
from aphrodite_jax.testing.input_side import Arrays, InputSide
from aphrodite_jax.testing.programs import compile_fast, fast_options, temp_bytes
from aphrodite_jax.testing.strategies import Request
from aphrodite_jax.testing.weights import random_weights
from kernels_pallas.intervals import RowIntervals, causal

__all__ = ["PlainModel", "shape_key", "shapes_of"]

FEWEST_ROWS, MORE_ROWS = 64, 4
"""Rows of a call of the model, and by how many times they are more where a prompt needs more."""


class PlainModel:
    """The model behind input functions; its weights are drawn here.

    Attributes:
      graphdef, state: of the nnx module.
      width: of token embeddings, which may be more than that of hidden states.
    """

    def __init__(self, inputs: InputSide):
        self._inputs = inputs
        self.graphdef, self.state = random_weights(inputs.model_cls, inputs.hf_config)
        self.width = jax.eval_shape(self._embed, self.state, jax.ShapeDtypeStruct((1,), np.int32)).shape[1]
        self._rows: dict[tuple, dict[str, tuple[int, ...]]] = {}
        self._encoders: dict[tuple, Any] = {}
        self._items: dict[str, np.ndarray] = {}

    def rows(self, arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Rows of each item by modality, by shapes alone."""
        key = shape_key(arrays)
        if key not in self._rows:
            embeds = jax.eval_shape(self._encode, self.state, shapes_of(arrays))
            self._rows[key] = {modality: tuple(len(item) for item in items) for modality, items in embeds.items()}
        return self._rows[key]

    def encode(self, arrays: Arrays) -> dict[str, list[np.ndarray]]:
        """Rows of each item by modality."""
        return jax.tree.map(np.asarray, self._encoder(arrays)(self.state, dict(arrays)))

    def encode_bytes(self, arrays: Mapping[str, Any]) -> int:
        """Temporary memory of the program that encodes such arrays, as the compiler tells."""
        return temp_bytes(self._encoder(arrays))

    def encode_item(self, modality: str, opened: Any) -> np.ndarray:
        """An item's own rows ``[rows, D]``; as given where they were computed before."""
        key = content_hash(opened, {"modality": modality})
        if key not in self._items:
            if embedding_rows(opened):
                self._items[key] = opened
            else:
                arrays = self._inputs.map(modality, opened)
                (count,) = self.rows(arrays)[modality]
                (rows,) = self.encode(self._inputs.pad(arrays))[modality]
                self._items[key] = rows[:count]
        return self._items[key]

    def logits(
        self,
        request: Request,
        *,
        answer: Sequence[int] = (),
        change: np.ndarray | None = None,
        padding: float = 0.0,
    ) -> np.ndarray:
        """Of every row ``[T, V]``, by one call of the model over the whole prompt, with encoded items in their places.

        Args:
          answer: tokens behind the prompt, which are rows too.
          change: ``[T, D]`` to be added to the embeddings.
          padding: to be added to those of rows behind, which see nothing and which no row sees.
        """
        inputs = self._inputs.process(request)
        token_ids, positions, metadata = self._arguments(inputs, answer)
        length = len(inputs.prompt_token_ids) + len(answer)
        media, added = np.zeros((2, len(token_ids), self.width), np.float32)
        is_media = np.zeros(len(token_ids), bool)
        for modality, items in inputs.multi_modal_data.items():
            for item, span in zip(items, inputs.placeholders[modality], strict=True):
                media[span.row_tokens] = self.encode_item(modality, item)
                is_media[span.row_tokens] = True
        added[length:] = padding
        if change is not None:
            added[:length] = change
        call = self._jitted_rows_call
        return np.asarray(call(self.state, token_ids, positions, metadata, media, is_media, added))[:length]

    def logits_by_arrays(self, request: Request) -> np.ndarray:
        """The same by a call that gets the mappers' arrays, and encodes them itself."""
        inputs = self._inputs.process(request)
        arrays = dict(MULTIMODAL_REGISTRY.map_input(self._inputs.model_config, request[1]))
        logits = self._jitted_arrays_call(self.state, *self._arguments(inputs), arrays)
        return np.asarray(logits)[: len(inputs.prompt_token_ids)]

    def _arguments(
        self, inputs: LLMInputs, answer: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, AttentionMetadata]:
        """Tokens, positions and masks of prompt and answer, with rows of text behind up to one of a few lengths."""
        token_ids = np.asarray(inputs.prompt_token_ids, np.int32)
        prompt, length, rows = len(token_ids), len(token_ids) + len(answer), FEWEST_ROWS
        while rows < length:
            rows *= MORE_ROWS
        positions = prompt_positions(self._inputs.model_config, token_ids, map_media(self._inputs.model_config, inputs))
        positions = np.arange(prompt, dtype=np.int32) if positions is None else positions
        following = positions.max() + 1 + np.arange(rows - prompt, dtype=np.int32)
        kinds = self._inputs.model_cls.mask_specs(self._inputs.hf_config)
        intervals = {}
        for kind, of_prompt in prompt_intervals(kinds, prompt, inputs.placeholders).items():
            of_answer = causal(len(answer), offset=prompt, window=kinds[kind].window)
            both = (np.concatenate(parts) for parts in zip(of_prompt, of_answer, strict=True))
            intervals[kind] = RowIntervals(*(np.pad(x, (0, rows - length)) for x in both))
        lengths = np.maximum(np.arange(rows) + 1, prompt).astype(np.int32)
        return (
            np.concatenate([token_ids, answer, np.full(rows - length, self._inputs.text_tokens[0])]).astype(np.int32),
            np.concatenate([positions, np.broadcast_to(following, (*positions.shape[:-1], rows - prompt))], axis=-1),
            AttentionMetadata(intervals=intervals, lengths=lengths),  # pyright: ignore[reportArgumentType] - by a jit
        )

    def _model(self, state) -> Any:
        return nnx.merge(self.graphdef, state)

    def _encode(self, state, arrays):
        embeds = self._model(state).embed_multimodal(**arrays)
        return {modality: list(items) for modality, items in embeds.items()}

    def _embed(self, state, token_ids):
        return self._model(state).embed_input_ids(token_ids)

    def _encoder(self, arrays: Mapping[str, Any]) -> Any:
        key = shape_key(arrays)
        if key not in self._encoders:
            self._encoders[key] = compile_fast(self._encode, self.state, shapes_of(arrays))
        return self._encoders[key]

    @functools.cached_property
    def _jitted_rows_call(self):
        def call(state, token_ids, positions, metadata, media, is_media, added):
            model = self._model(state)
            embeds = jnp.where(is_media[:, None], media, model.embed_input_ids(token_ids)) + added
            hidden, _ = model(token_ids, positions, None, metadata, inputs_embeds=embeds)
            return model.compute_logits(hidden)

        return jax.jit(call, compiler_options=fast_options())

    @functools.cached_property
    def _jitted_arrays_call(self):
        def call(state, token_ids, positions, metadata, arrays):
            model = self._model(state)
            hidden, _ = model(token_ids, positions, None, metadata, **arrays)
            return model.compute_logits(hidden)

        return jax.jit(call, compiler_options=fast_options())


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays without their numbers."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def shape_key(arrays: Mapping[str, Any]) -> tuple:
    """What decides the program that encodes such arrays."""
    return tuple((name, tuple(x.shape), str(x.dtype)) for name, x in sorted(arrays.items()))
