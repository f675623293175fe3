"""A model under test: its class, a tiny config, a checkpoint of random weights, and how to call its parts."""

import contextlib
import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from hypothesis.strategies import SearchStrategy

from aphrodite_jax import architectures
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import map_media, prompt_intervals, prompt_positions
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import INPUT_REGISTRY, InputContext, LLMInputs
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.loader import save_pretrained
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.testing.strategies import Request, images, requests, videos
from aphrodite_jax.testing.tokenizers import byte_tokenizer

__all__ = ["LIMIT", "Subject", "open_subject"]

LIMIT = 2
"""Items of each modality in a prompt at most."""
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class Subject:
    """What the clauses ask.

    Attributes:
      items: modality to a strategy of items as a user gives them.
      placeholders: modality to the token that stands for an item in a prompt.
      max_examples: that a clause tries at most.
    """

    model_cls: Any
    hf_config: transformers.PretrainedConfig
    model_config: ModelConfig
    model: Any
    items: Mapping[str, SearchStrategy]
    placeholders: Mapping[str, int]
    max_examples: int
    reference: Any = None

    @property
    def context(self) -> InputContext:
        """What the model's input functions get."""
        return InputContext(self.model_config)

    @functools.cached_property
    def requests(self) -> SearchStrategy[Request]:
        """Prompts with items."""
        vocab_size = self.model_config.hf_text_config.vocab_size
        tokens = [token for token in range(3, min(vocab_size, 60)) if token not in self.placeholders.values()]
        return requests(self.items, self.placeholders, tokens, most=LIMIT)

    @functools.cached_property
    def bounds(self) -> Mapping[str, int]:
        """Registered bounds of tokens."""
        return MULTIMODAL_REGISTRY.max_tokens_per_item(self.model_config)

    @functools.cached_property
    def dummy(self) -> LLMInputs:
        """The registered dummy data, processed."""
        dummy = INPUT_REGISTRY.dummy_data_for_profiling(self.model_config, self.model_config.context_length)
        return self.process((dummy.prompt_token_ids, dict(dummy.multi_modal_data)))

    def process(self, request: Request) -> LLMInputs:
        """The request through the input processor."""
        tokens, media = request
        return INPUT_REGISTRY.process_input(
            self.model_config, LLMInputs(prompt_token_ids=tokens, multi_modal_data=media)
        )

    def open(self, modality: str, item: Any) -> Any:
        """The item as mappers get it."""
        (opened,) = MULTIMODAL_REGISTRY.open_items(self.model_config, modality, [item])
        return opened

    def map(self, modality: str, opened: Any) -> Arrays:
        """What the mapper makes of an opened item now, whatever is kept of an earlier call."""
        mapped = MULTIMODAL_REGISTRY.mapper(self.model_config, modality)(self.context, (opened,))
        return {name: np.asarray(array) for name, array in mapped.items()}

    def pad(self, arrays: Arrays) -> Arrays:
        """As the encoder gets them."""
        padded = self.model_cls.pad_media(self.hf_config, dict(arrays))
        return {name: np.asarray(array) for name, array in padded.items()}

    def rows(self, arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Rows of each item by modality, by shapes alone."""
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
        embeds = jax.eval_shape(self._encode, self._state, shapes)
        return {modality: tuple(len(item) for item in items) for modality, items in embeds.items()}

    def encode(self, arrays: Arrays) -> dict[str, list[np.ndarray]]:
        """Rows of each item by modality."""
        return jax.tree.map(np.asarray, self._jitted_encode(self._state, arrays))

    def encode_bytes(self, shapes: Mapping[str, Any]) -> int:
        """Temporary memory of the program that encodes one item of such arrays, as the compiler tells."""
        compiled = self._jitted_encode.lower(self._state, dict(shapes)).compile()
        analysis = compiled.memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes

    def logits(self, request: Request, *, embeds: np.ndarray | None = None) -> np.ndarray:
        """Of every row ``[T, V]``, by one plain call of the model, without an engine."""
        inputs = self.process(request)
        token_ids = np.asarray(inputs.prompt_token_ids, np.int32)
        arrays = {} if embeds is not None else dict(MULTIMODAL_REGISTRY.map_input(self.model_config, request[1]))
        positions = prompt_positions(self.model_config, token_ids, map_media(self.model_config, inputs))
        positions = np.arange(len(token_ids)) if positions is None else positions
        kinds = self.model_cls.mask_specs(self.hf_config)
        intervals = prompt_intervals(kinds, len(token_ids), inputs.placeholders)
        metadata = AttentionMetadata(intervals=intervals)
        return np.asarray(self._jitted_call(self._state, token_ids, positions, metadata, arrays, embeds))

    @functools.cached_property
    def _split(self):
        return nnx.split(self.model)

    @property
    def _state(self):
        return self._split[1]

    def _encode(self, state, arrays):
        embeds = nnx.merge(self._split[0], state).embed_multimodal(**arrays)
        return {modality: list(items) for modality, items in embeds.items()}

    @functools.cached_property
    def _jitted_encode(self):
        return jax.jit(self._encode)

    @functools.cached_property
    def _jitted_call(self):
        def call(state, token_ids, positions, metadata, arrays, embeds):
            model = nnx.merge(self._split[0], state)
            given = {} if embeds is None else {"inputs_embeds": embeds}
            hidden, _ = model(token_ids, positions, None, metadata, **arrays, **given)
            return model.compute_logits(hidden)

        return jax.jit(call)


@contextlib.contextmanager
def open_subject(
    model_cls: Any,
    hf_config: transformers.PretrainedConfig,
    *,
    strategies: Mapping[str, SearchStrategy] | None,
    placeholders: Mapping[str, int] | None,
    files: Mapping[str, Any],
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    max_examples: int,
    reference: Any,
) -> Iterator[Subject]:
    """A checkpoint of random weights in a directory of its own, served by ``model_cls`` as long as this is open."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.architectures = [model_cls.__name__]
    model = model_cls(hf_config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    table = dict(architectures._TABLE)
    architectures.register_model(model_cls.__name__)(model_cls)
    try:
        with tempfile.TemporaryDirectory(prefix="aphrodite-jax-conformance-") as directory:
            save_pretrained(model, hf_config, directory)
            (tokenizer or byte_tokenizer()).save_pretrained(directory)
            for name, content in files.items():
                (Path(directory) / name).write_text(json.dumps(content))
            modalities = MULTIMODAL_REGISTRY.modalities(model_cls)
            limits = {modality: LIMIT for modality in modalities}
            model_config = ModelConfig(model=directory, dtype="float32", limit_mm_per_prompt=limits)
            usual = {"image": images(), "video": videos()}
            known = usual | dict(strategies or {})
            if missing := [name for name in modalities if name not in known]:
                raise ConfigError(f"give a strategy for {', '.join(missing)}: strategies={{{missing[0]!r}: ...}}")
            yield Subject(
                model_cls=model_cls,
                hf_config=model_config.hf_config,
                model_config=model_config,
                model=model,
                items={name: known[name] for name in modalities},
                placeholders={name: _placeholder(hf_config, name, placeholders or {}) for name in modalities},
                max_examples=max_examples,
                reference=reference,
            )
    finally:
        architectures._TABLE.clear()
        architectures._TABLE.update(table)


def _placeholder(hf_config: Any, modality: str, given: Mapping[str, int]) -> int:
    for found in (
        given.get(modality),
        getattr(hf_config, f"{modality}_token_id", None),
        getattr(hf_config, f"{modality}_token_index", None),
    ):
        if isinstance(found, int):
            return found
    raise ConfigError(
        f"the config does not tell the token that stands for an item: give placeholders={{{modality!r}: token id}}"
    )
