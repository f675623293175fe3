"""The device side: a model, its caches, and the runs of its programs (`executor.model_programs`).

The KV cache, the encoder cache and the array of latest tokens are donated to each program that writes them and
replaced by its result. Nothing here waits for the device but `prompt_logprobs`: what `sample` and `decode` give are
arrays that may still be on their way.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import kernels_pallas.platform
from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.executor import memory
from aphrodite_jax.executor.batch import Rows
from aphrodite_jax.executor.model_programs import (
    MAX_DECODE_STEPS,
    PROMPT_LOGPROB_ROWS,
    DeviceArrays,
    MediaShapes,
    ModelPrograms,
)
from aphrodite_jax.executor.observation import ObservedModel
from aphrodite_jax.executor.programs import CompileJob, Programs
from aphrodite_jax.modeling.item_rows import RowsPerItem
from aphrodite_jax.sampling import SampledTokens, SamplingBatch

__all__ = ["MAX_DECODE_STEPS", "ModelRunner"]


class ModelRunner:
    """Runs one model on one device, or on the devices of a mesh.

    Args:
      model: the nnx module with its weights.
      model_config, engine_config: as given by the user.
      media_budget: rows that the media of one prompt at its limits take; 0 for a text model.
      max_num_batched_tokens: tokens of a prefill step.
      media_shapes: gives the arrays of one item for each shape in which media are encoded, from `rows_per_item`; it is
        asked where memory must be planned and when programs are compiled ahead.
      mesh: the devices that the model's weights are divided over; None for one device.

    Raises:
      ConfigError: the devices do not divide the model's heads, or their memory is too small.
    """

    def __init__(
        self,
        model: Any,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        *,
        media_budget: int,
        max_num_batched_tokens: int,
        media_shapes: Callable[[RowsPerItem], Sequence[MediaShapes]] = lambda rows_per_item: (),
        mesh: Mesh | None = None,
    ):
        device = jax.devices()[0]
        self._model_programs = made = ModelPrograms(
            model,
            model_config,
            engine_config,
            media_budget=media_budget,
            max_num_batched_tokens=max_num_batched_tokens,
            media_shapes=media_shapes,
            mesh=mesh,
            platform=device.platform,
        )
        self.mask_specs = made.mask_specs
        self.buckets = made.buckets
        self.page_size = made.page_size
        self.context_length = made.context_length
        self.vocab_size = made.vocab_size
        self.encoder_rows = made.encoder_rows
        self.num_slots = made.num_slots
        self.num_layers = made.num_layers
        self.rows_per_item = made.rows_per_item
        self.num_greedy_rows = made.num_greedy_rows
        self.attention_implementation = kernels_pallas.platform.default()
        self._limit = memory.device_limit(device, engine_config.memory_fraction)
        planned = Programs(engine_config.on_recompile, mesh)  # which have another number of pages than the real ones
        self.num_pages = memory.plan_pages(made, engine_config, self._limit, planned)
        self.programs = Programs(engine_config.on_recompile, mesh, made.saved_programs(model_config, engine_config))
        shapes = made.arrays(self.num_pages)
        self._params = shapes.params  # which are arrays here
        self._kv_caches = jax.tree.map(_zeros, shapes.kv_caches)
        self._encoder_cache = _zeros(shapes.encoder_cache)
        self._last_tokens = _zeros(shapes.last_tokens)

    @functools.cached_property
    def observed_model(self) -> ObservedModel:
        """The model, to be looked into apart from the engine's programs."""
        return ObservedModel(self._model_programs.graphdef, self._params, self._model_programs.mesh)

    @property
    def _arrays(self) -> DeviceArrays:
        return DeviceArrays(
            params=self._params,
            kv_caches=self._kv_caches,
            encoder_cache=self._encoder_cache,
            last_tokens=self._last_tokens,
        )

    # Start-up.

    def warm_up(self, *, show_progress: bool) -> None:
        """Compile every program of every bucket."""
        self.programs.compile(self._model_programs.all_jobs(self._arrays), show_progress=show_progress)
        self.programs.seal()

    def memory_budget(self) -> memory.MemoryBudget:
        """Bytes by purpose, programs as compiled so far."""
        return memory.MemoryBudget.of(self._arrays, self.programs, self._limit)

    # Steps.

    def encode(self, items: Sequence[Mapping[str, np.ndarray]], rows: Sequence[np.ndarray]) -> None:
        """Encode media items with arrays of equal shapes into ``rows[i]`` of the encoder cache.

        Where an item has fewer rows there than the model makes of it, the last ones are padding.
        """
        begin = 0
        while begin < len(items):  # in parts that fill their buckets: a tower's work on nothing costs more than a call
            count = self._model_programs.encode_part(items[0], len(items) - begin)
            part = items[begin : begin + count]
            media = {name: np.concatenate([item[name] for item in part]) for name in part[0]}
            job = self._model_programs.encode_job(self._arrays, media, count, rows[begin : begin + count])
            self._encoder_cache = self.programs.run(job)
            begin += count

    def store(self, embeds: np.ndarray, rows: np.ndarray) -> None:
        """Put embeddings ``[n, D]`` that the user computed into ``rows`` of the encoder cache."""
        size = self._model_programs.store_size(len(embeds))
        padded = np.zeros((size, self._model_programs.width), self._model_programs.dtype)
        padded[: len(embeds)] = embeds
        targets = np.full(size, self.encoder_rows, np.int32)
        targets[: len(rows)] = rows
        self._encoder_cache = self.programs.run(self._model_programs.store_job(self._arrays, padded, targets))

    def forward(self, decode: Sequence[Rows], prefill: Sequence[Rows]) -> tuple[jax.Array, jax.Array, np.ndarray]:
        """Run rows of several requests: those of ``decode`` have one each and come first.

        Returns:
          logits ``[R, V]`` of each request's last row, hidden states ``[T, D]`` of prefill rows, and where each
          prefill request's rows begin among these.
        """
        shape = self._model_programs.batch_shape(decode, prefill)
        batch, offsets = self._model_programs.build(decode, prefill, *shape, num_pages=self.num_pages)
        job = self._model_programs.forward_job(self._arrays, batch)
        logits, hidden, self._kv_caches = self.programs.run(job)
        return logits, hidden, offsets[len(decode) :] - shape[0]

    def decode(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        offsets: Sequence[int],
        pages: Sequence[np.ndarray],
        num_steps: int,
    ) -> jax.Array:
        """The next ``num_steps`` tokens of requests, greedily, int32 ``[num_steps or more, requests or more]``.

        Args:
          slots: of the requests, whose latest tokens stand there.
          places: of these tokens among all of their requests; not in the prompt.
          offsets: what their positions have over their places.
          pages: of the requests, up to what these steps write.
          num_steps: at most `MAX_DECODE_STEPS`.
        """
        requests = self._model_programs.decode_arrays(slots, places, offsets, pages, self.num_pages)
        job = self._model_programs.decode_job(self._arrays, *requests, num_steps)
        tokens, self._last_tokens, self._kv_caches = self.programs.run(job)
        tokens.copy_to_host_async()
        return tokens

    def sample(
        self, logits: jax.Array, slots: np.ndarray, batch: SamplingBatch | None
    ) -> tuple[jax.Array, SampledTokens | None]:
        """Token ids ``[R]`` for the rows of ``logits [R, V]``, and what is told of them; without a batch greedily.

        ``slots [R]`` says where among the latest tokens each row's stands from now on; one past the end drops it.
        """
        job = self._model_programs.sample_job(self._arrays, logits, slots, batch)
        tokens, details, self._last_tokens = self.programs.run(job)
        for array in jax.tree.leaves((tokens, details)):
            array.copy_to_host_async()
        return tokens, details

    def prompt_logprobs(self, hidden: jax.Array, rows: np.ndarray, targets: np.ndarray):
        """Log-probabilities of ``targets [n]`` under the logits of ``hidden[rows]``, ``rows [n]``, on the host."""
        parts = []
        for begin in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            part = slice(begin, begin + PROMPT_LOGPROB_ROWS)
            padding = (0, PROMPT_LOGPROB_ROWS - len(targets[part]))
            padded = [np.pad(x[part], padding).astype(np.int32) for x in (rows, targets)]
            job: CompileJob = self._model_programs.prompt_logprobs_job(self._arrays, hidden, *padded)
            result = jax.device_get(self.programs.run(job))
            parts.append(jax.tree.map(lambda x, n=targets[part].size: x[:n], result))
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def num_rows(self, decode: Sequence[Rows], prefill: Sequence[Rows]) -> int:
        """Rows that `forward` computes for these, padding included."""
        num_decode, num_prefill, _ = self._model_programs.batch_shape(decode, prefill)
        return num_decode + num_prefill


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
