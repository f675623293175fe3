"""A model in an engine that compiles what is asked of it, and nothing that was not declared."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.engine import AphroditeEngine
from aphrodite_jax.executor.buckets import TILE_SIZE
from aphrodite_jax.outputs import RequestOutput
from aphrodite_jax.sampling_params import SamplingParams
from aphrodite_jax.testing.programs import DeclaredPrograms
from aphrodite_jax.testing.strategies import Arrival

__all__ = ["ANSWER_TOKENS", "Answer", "Served"]

ANSWER_TOKENS = 3
"""Of each answer."""
MAX_NUM_SEQS, PAGE_SIZE = 2, 8
"""Requests that run at a time, and tokens of a page."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What the engine says to a request: greedy tokens, and log-probabilities of the prompt's tokens but the first."""

    token_ids: tuple[int, ...]
    prompt_logprobs: np.ndarray

    def equals(self, other: "Answer", atol: float) -> bool:
        """Whether both tell the same of the prompt."""
        return np.allclose(self.prompt_logprobs, other.prompt_logprobs, atol=atol)


class Served:
    """An engine for two requests at a time, whose prompts go in chunks of one tile where their masks let them.

    Its warm-up declares all programs (`DeclaredPrograms`); each is compiled when it is first run.

    Args:
      longest_chunk: rows of a prompt that must be computed in one step, at most.
    """

    def __init__(self, model_config: ModelConfig, *, longest_chunk: int):
        engine_config = EngineConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=-(-longest_chunk // TILE_SIZE) * TILE_SIZE,
            max_encode_items=1,
            page_size=PAGE_SIZE,
            warm_up=False,
            on_recompile="raise",
            show_progress=False,
        )
        self.engine = AphroditeEngine(model_config, engine_config)
        self.programs = self.engine.runner.programs = DeclaredPrograms()
        self.engine.runner.warm_up(show_progress=False)
        self._num_requests = 0

    def answers(self, schedule: Sequence[Arrival]) -> list[Answer]:
        """Answers to requests that arrive one after another, with log-probabilities of their prompts."""
        return [
            Answer(
                token_ids=output.outputs[0].token_ids,
                prompt_logprobs=np.array([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]),
            )
            for output in self._outputs(schedule, prompt_logprobs=0)
        ]

    def run(self, schedule: Sequence[Arrival]) -> None:
        """Answer requests that ask for tokens alone, so that prompts may begin behind pages that are there."""
        self._outputs(schedule)

    def encode_shape(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Encode an item whose arrays have these shapes, and keep none of its rows."""
        arrays = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        self.engine.runner.encode([arrays], [np.zeros(0, np.int32)])

    def spoil_caches(self, value: float) -> None:
        """Put ``value`` wherever no request has written, and forget what they have."""
        self.engine.reset_caches()
        runner: Any = self.engine.runner
        for name in ("_kv_caches", "_encoder_cache"):
            spoilt = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, value, x.dtype)), getattr(runner, name))
            setattr(runner, name, spoilt)

    def _outputs(self, schedule: Sequence[Arrival], **options: Any) -> list[Any]:
        params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True, **options)
        found: dict[str, RequestOutput] = {}
        names, to_come = [], list(schedule)
        waited = 0
        while to_come or self.engine.has_unfinished_requests():
            while to_come and (waited >= to_come[0][0] or not self.engine.has_unfinished_requests()):
                _, (tokens, media) = to_come.pop(0)
                names.append(f"request {self._num_requests}")
                self._num_requests += 1
                prompt = {"prompt_token_ids": list(tokens), "multi_modal_data": media}
                self.engine.add_request(names[-1], prompt, params)
                waited = 0
            found |= {output.request_id: output for output in self.engine.step()}
            waited += 1
        return [found[name] for name in names]
