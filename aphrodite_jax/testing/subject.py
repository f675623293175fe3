"""A model under test: its class, a tiny config, a checkpoint of random weights, and how to call its parts.

What costs seconds is made when it is first asked for: weights, programs, the engine.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from flax import nnx
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from aphrodite_jax import architectures
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import prompt_intervals
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.loader import save_pretrained
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.testing.input_side import InputSide
from aphrodite_jax.testing.plain_model import PlainModel
from aphrodite_jax.testing.served import Served
from aphrodite_jax.testing.strategies import Request, images, requests, videos
from aphrodite_jax.testing.tokenizers import byte_tokenizer
from kernels_pallas.intervals import ends_cleanly

__all__ = ["LIMIT", "LONGEST_TEXT", "Subject", "open_subject"]

LIMIT = 2
"""Items of each modality in a prompt at most."""
TEXT_TOKENS = 12
"""Of a prompt with items at most."""
LONGEST_TEXT = 33
"""Tokens of a prompt without items at most: more than two tiles."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Subject(InputSide):
    """What the clauses ask.

    Attributes:
      items: modality to a strategy of items as a user gives them.
      max_examples: that a clause tries at most.
      reference: as for `check_multimodal_model`.
    """

    items: Mapping[str, SearchStrategy]
    max_examples: int
    reference: Any = None

    @functools.cached_property
    def requests(self) -> SearchStrategy[Request]:
        """Prompts with items: any number of them, or of one modality as many as there may be."""
        of_text = {"tokens": self.text_tokens, "most_tokens": TEXT_TOKENS}
        full = (
            requests({modality: strategy}, self.placeholders, fewest=LIMIT, most=LIMIT, **of_text)
            for modality, strategy in self.items.items()
        )
        return requests(self.items, self.placeholders, most=LIMIT, **of_text) | st.one_of(*full)

    @functools.cached_property
    def plain(self) -> PlainModel:
        """The model with random weights, without an engine."""
        return PlainModel(self)

    @functools.cached_property
    def checkpoint(self) -> str:
        """The directory, with the weights in it."""
        model = nnx.merge(self.plain.graphdef, self.plain.state)
        save_pretrained(model, self.hf_config, self.model_config.model)
        return self.model_config.model

    @functools.cached_property
    def served(self) -> Served:
        """The model in an engine."""
        assert self.checkpoint
        return Served(self.model_config, longest_chunk=self._longest_chunk())

    def _longest_chunk(self) -> int:
        """Rows of the longest run of a prompt that must be computed in one step, where all items touch."""
        media = {modality: list(items) for modality, items in self.dummy.multi_modal_data.items()}
        items = [self.placeholders[modality] for modality, given in media.items() for _ in given]
        inputs = self.process(((*items, *self.text_tokens[:1] * LONGEST_TEXT), media))
        length = len(inputs.prompt_token_ids)
        intervals = prompt_intervals(self.model_cls.mask_specs(self.hf_config), length, inputs.placeholders)
        ends = ends_cleanly(np.max([rows.stop for rows in intervals.values()], axis=0))
        return int(np.diff(1 + np.flatnonzero(ends), prepend=0).max())


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
    """A checkpoint in a directory of its own, served by ``model_cls`` as long as this is open."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.architectures = [model_cls.__name__]
    hf_config.dtype = "float32"
    table = dict(architectures._TABLE)
    architectures.register_model(model_cls.__name__)(model_cls)
    try:
        with tempfile.TemporaryDirectory(prefix="aphrodite-jax-conformance-") as directory:
            (Path(directory) / "config.json").write_text(hf_config.to_json_string(use_diff=True))
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
