"""The device side: a model, its caches, and the kinds of programs that run on them.

    encode   media arrays           -> rows of the encoder cache
    store    precomputed embeddings -> rows of the encoder cache
    forward  a batch of rows        -> logits of each request's last row; KV pages written
    sample   logits                 -> tokens
    decode   requests               -> their next tokens, greedily, one or more of each; KV pages written

The KV cache, the encoder cache and the array of latest tokens are donated to each program that writes them and
replaced by its result. Nothing here waits for the device but `prompt_logprobs`: what `sample` and `decode` give are
arrays that may still be on their way.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kernels_pallas.platform
from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor import memory
from aphrodite_jax.executor.batch import ForwardBatch, Rows, build_batch
from aphrodite_jax.executor.buckets import TILE_SIZE, make_buckets, round_down, round_up
from aphrodite_jax.executor.observation import ObservedModel
from aphrodite_jax.executor.programs import CompileJob, Programs
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, PagedLayout
from aphrodite_jax.modeling.models.interfaces import position_axes, supports_multimodal
from aphrodite_jax.modeling.sharding import MODEL, check_heads, whole
from aphrodite_jax.sampling import (
    SampledTokens,
    SamplingBatch,
    build_sampling_batch,
    prompt_logprobs,
    sample,
    sample_greedy,
)
from aphrodite_jax.sampling_params import MAX_LOGPROBS
from kernels_pallas.intervals import RowIntervals, causal
from kernels_pallas.paged_attention import check_block_tables
from kernels_pallas.pages import pages_shape

__all__ = ["MAX_DECODE_STEPS", "ModelRunner", "RowsPerItem"]

MediaShapes = Mapping[str, jax.ShapeDtypeStruct]
"""Arrays of media by keyword, as shapes."""
RowsPerItem = Callable[[Mapping[str, np.ndarray]], Mapping[str, tuple[int, ...]]]

PROMPT_LOGPROB_ROWS = 64
"""Rows whose prompt log-probabilities are computed at a time."""
MAX_ENCODE_ROWS = 4096
"""Rows of media that are encoded together at most; one item may have more."""
EVERYWHERE, BY_HEAD = PartitionSpec(), PartitionSpec(None, MODEL)
"""Where arrays lie on a mesh: whole on every device, or their heads divided."""
MAX_DECODE_STEPS = 8
"""Tokens of each request in one decode program at most."""


class ModelRunner:
    """Runs one model on one device.

    Args:
      model: the nnx module with its weights.
      model_config, engine_config: as given by the user.
      media_budget: rows that the media of one prompt at its limits take; 0 for a text model.
      max_num_batched_tokens: tokens of a prefill step.
      media_shapes: gives the arrays of one item for each shape in which media are encoded, from `rows_per_item`; it is
        asked where memory must be planned and when programs are compiled ahead.
      mesh: the devices that the model's weights are divided over; None for one device.

    Raises:
      ConfigError: the devices do not divide the model's heads.
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
        hf_config = model_config.hf_config
        self._graphdef: Any
        self._graphdef, self._params = nnx.split(model)
        self._model_cls = type(model)
        self._multimodal = supports_multimodal(type(model))
        self._position_axes = position_axes(type(model))
        self.mask_specs = type(model).mask_specs(hf_config)
        self.buckets = make_buckets(engine_config.max_num_seqs, max_num_batched_tokens, engine_config.max_encode_items)
        self.page_size = engine_config.page_size
        self.attention_implementation = kernels_pallas.platform.default()
        self.context_length = model_config.context_length
        self._max_pages = -(-self.context_length // self.page_size)
        self._mesh = mesh
        self.programs = Programs(engine_config.on_recompile, mesh)
        self._dtype = jax.tree.leaves(self._params)[0].dtype
        self._width = self._embedding_width()  # which may be more than the hidden states have: `embed_input_ids`
        self._hidden_width = model_config.hf_text_config.hidden_size
        self.vocab_size = self._logits_width()
        self.encoder_rows = self._choose_encoder_rows(engine_config, media_budget)
        self._encoder_cache = self._zeros((max(self.encoder_rows, 1), self._width), self._dtype)
        self.num_slots = engine_config.max_num_seqs
        self._last_tokens = self._zeros((self.num_slots,), jnp.int32)
        self._kv_shapes = self._kv_shapes_on_mesh(type(model).kv_cache_shapes(hf_config), model_config.hf_text_config)
        self._find_media_shapes = media_shapes
        self._allocate_pages(engine_config)

    @functools.cached_property
    def observed_model(self) -> ObservedModel:
        """The model, to be looked into apart from the engine's programs."""
        return ObservedModel(self._graphdef, self._params, self._mesh)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._kv_shapes)

    # Start-up.

    def warm_up(self, *, show_progress: bool) -> None:
        """Compile every program of every bucket."""
        logits = [self._shape((n, self.vocab_size), jnp.float32) for n in self.buckets.decode_requests]
        jobs = [self._sample_job(x, np.zeros(len(x), np.int32), None) for x in logits]
        jobs += [
            self._sample_job(x, np.zeros(len(x), np.int32), self._dummy_sampling(len(x), width))
            for x in logits
            for width in (0, self.context_length)  # without and with penalties
        ]
        jobs += [self._forward_job(self._dummy_batch(*shape)) for shape in self.buckets.shapes()]
        jobs += [self._decode_job(*self._decode_arrays((), (), (), ()), 1, n) for n in self.buckets.greedy_requests]
        jobs += [self._encode_job_of(shapes, n) for shapes in self._media_shapes for n in self._encode_counts(shapes)]
        if self._multimodal:
            jobs += [
                self._store_job(np.zeros((rows, self._width), self._dtype), np.zeros(rows, np.int32))
                for rows in self._store_buckets()
            ]
        rows = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
        jobs += [
            self._prompt_logprobs_job(self._shape((tokens, self._hidden_width), self._dtype), rows, rows)
            for tokens in self.buckets.prefill_tokens
        ]
        self.programs.compile(jobs, show_progress=show_progress)
        self.programs.seal()

    def memory_budget(self) -> memory.MemoryBudget:
        """Bytes by purpose, programs as compiled so far."""
        return memory.MemoryBudget(
            weights=_nbytes(self._params),
            kv_pages=_nbytes(self._kv_caches),
            encoder_cache=_nbytes(self._encoder_cache),
            forward=self.programs.largest_temp_bytes("forward"),
            encode=self.programs.largest_temp_bytes("encode"),
            total=self._limit,
        )

    # Steps.

    def rows_per_item(self, mm_kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Rows that the model would make of each item, by modality: shapes alone, nothing runs."""
        shapes = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(mm_kwargs.items()))
        return self._rows_of_shapes(shapes)

    def encode(self, items: Sequence[Mapping[str, np.ndarray]], rows: Sequence[np.ndarray]) -> None:
        """Encode media items with arrays of equal shapes into ``rows[i]`` of the encoder cache.

        Where an item has fewer rows there than the model makes of it, the last ones are padding.
        """
        begin = 0
        while begin < len(items):  # in parts that fill their buckets: a tower's work on nothing costs more than a call
            count = round_down(len(items) - begin, self._encode_counts(items[0]))
            part = items[begin : begin + count]
            arrays = {name: np.concatenate([item[name] for item in part]) for name in part[0]}
            job = self._encode_job(arrays, count, rows[begin : begin + count])
            self._encoder_cache = self.programs.run(job)
            begin += count

    def store(self, embeds: np.ndarray, rows: np.ndarray) -> None:
        """Put embeddings ``[n, D]`` that the user computed into ``rows`` of the encoder cache."""
        size = round_up(len(embeds), self._store_buckets())
        padded = np.zeros((size, self._width), self._dtype)
        padded[: len(embeds)] = embeds
        targets = np.full(size, self.encoder_rows, np.int32)
        targets[: len(rows)] = rows
        self._encoder_cache = self.programs.run(self._store_job(padded, targets))

    def forward(self, decode: Sequence[Rows], prefill: Sequence[Rows]) -> tuple[jax.Array, jax.Array, np.ndarray]:
        """Run rows of several requests: those of ``decode`` have one each and come first.

        Returns:
          logits ``[R, V]`` of each request's last row, hidden states ``[T, D]`` of prefill rows, and where each
          prefill request's rows begin among these.
        """
        shape = self._batch_shape(decode, prefill)
        batch, offsets = self._build(decode, prefill, *shape)
        logits, hidden, self._kv_caches = self.programs.run(self._forward_job(batch))
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
        job = self._decode_job(*self._decode_arrays(slots, places, offsets, pages), num_steps)
        tokens, self._last_tokens, self._kv_caches = self.programs.run(job)
        tokens.copy_to_host_async()
        return tokens

    def sample(
        self, logits: jax.Array, slots: np.ndarray, batch: SamplingBatch | None
    ) -> tuple[jax.Array, SampledTokens | None]:
        """Token ids ``[R]`` for the rows of ``logits [R, V]``, and what is told of them; without a batch greedily.

        ``slots [R]`` says where among the latest tokens each row's stands from now on; one past the end drops it.
        """
        tokens, details, self._last_tokens = self.programs.run(self._sample_job(logits, slots, batch))
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
            result = jax.device_get(self.programs.run(self._prompt_logprobs_job(hidden, *padded)))
            parts.append(jax.tree.map(lambda x, n=targets[part].size: x[:n], result))
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    @functools.cached_property
    def _media_shapes(self) -> Sequence[MediaShapes]:
        return self._find_media_shapes(self.rows_per_item) if self._multimodal else ()

    # Programs: each method says what one takes, for a run and for compiling ahead alike.

    def _forward_job(self, batch: ForwardBatch) -> CompileJob:
        paged = batch.metadata.paged
        assert paged is not None
        num_decode = paged.decode_rows

        def forward(params, kv_caches, encoder_cache, last_tokens, batch):
            model = nnx.merge(self._graphdef, params)
            latest = last_tokens[jnp.maximum(batch.token_slots, 0)]
            input_ids = jnp.where(batch.token_slots >= 0, latest, batch.input_ids)
            embeds = model.embed_input_ids(input_ids)
            if self._multimodal:
                media = encoder_cache[jnp.maximum(batch.media_rows, 0)]
                embeds = jnp.where((batch.media_rows >= 0)[:, None], media, embeds)
            hidden, kv_caches = model(input_ids, batch.positions, kv_caches, batch.metadata, inputs_embeds=embeds)
            return whole(model.compute_logits(hidden[batch.last_rows])), whole(hidden[num_decode:]), kv_caches

        key = (num_decode, len(batch.input_ids) - num_decode, len(batch.last_rows))
        args = (self._params, self._kv_caches, self._encoder_cache, self._last_tokens, batch)
        return CompileJob(name="forward", key=key, fn=forward, args=args, donate=(1,))

    def _decode_job(self, slots, places, offsets, tables, num_steps: int, size: int | None = None) -> CompileJob:
        size = self.num_greedy_rows(len(slots)) if size is None else size
        padding = size - len(slots)
        arrays = (
            np.pad(slots, (0, padding), constant_values=self.num_slots),
            np.pad(places, (0, padding)),
            np.pad(offsets, (0, padding)),
            np.pad(tables, ((0, padding), (0, 0))),
        )

        def decode(params, kv_caches, last_tokens, slots, places, offsets, tables, num_steps):
            model = nnx.merge(self._graphdef, params)

            def step(i, carry):
                kv_caches, tokens, chosen = carry
                metadata = self._decode_metadata(slots, places + i, tables)
                positions = places + offsets + i
                if self._position_axes > 1:
                    positions = jnp.broadcast_to(positions, (self._position_axes, len(slots)))
                embeds = model.embed_input_ids(tokens)
                hidden, kv_caches = model(tokens, positions, kv_caches, metadata, inputs_embeds=embeds)
                tokens = sample_greedy(whole(model.compute_logits(hidden)))
                return kv_caches, tokens, chosen.at[i].set(tokens)

            tokens = last_tokens[jnp.minimum(slots, self.num_slots - 1)]
            chosen = jnp.zeros((MAX_DECODE_STEPS, len(slots)), jnp.int32)
            kv_caches, tokens, chosen = jax.lax.fori_loop(0, num_steps, step, (kv_caches, tokens, chosen))
            return whole(chosen), whole(last_tokens.at[slots].set(tokens, mode="drop")), kv_caches

        args = (self._params, self._kv_caches, self._last_tokens, *arrays, np.int32(num_steps))
        return CompileJob(name="decode", key=size, fn=decode, args=args, donate=(1, 2))

    def _decode_metadata(self, slots, places, tables) -> AttentionMetadata:
        """What attention must know of one row of each request, on the device; requests without a slot see nothing."""
        there = slots < self.num_slots
        page = jnp.take_along_axis(tables, (places // self.page_size)[:, None], axis=1)[:, 0]
        stop = jnp.where(there, places + 1, 0)
        intervals = {
            kind: RowIntervals(jnp.maximum(stop - spec.window, 0) if spec.window else jnp.zeros_like(stop), stop)
            for kind, spec in self.mask_specs.items()
        }
        requests = jnp.arange(len(slots), dtype=jnp.int32)
        at = jnp.where(there, page * self.page_size + places % self.page_size, self.num_pages * self.page_size)
        paged = PagedLayout(slots=at, block_tables=tables, tile_request=requests, decode_rows=len(slots))
        return AttentionMetadata(intervals=intervals, lengths=jnp.maximum(stop, 1), paged=paged)

    def _decode_arrays(self, slots, places, offsets, pages):
        tables = np.zeros((len(slots), self._max_pages), np.int32)
        for table, held in zip(tables, pages, strict=True):
            table[: len(held)] = held
        check_block_tables(tables, self.num_pages)
        return np.array(slots, np.int32), np.array(places, np.int32), np.array(offsets, np.int32), tables

    def _encode_job(self, arrays: Mapping[str, Any], count: int, rows: Sequence[np.ndarray] = ()) -> CompileJob:
        def encode(params, encoder_cache, arrays, targets):
            embeds = nnx.merge(self._graphdef, params).embed_multimodal(**arrays)
            made = jnp.concatenate([item for items in embeds.values() for item in items])
            return whole(encoder_cache.at[targets].set(whole(made).astype(encoder_cache.dtype), mode="drop"))

        per_item = [n for counts in self.rows_per_item(arrays).values() for n in counts]
        targets = np.full(sum(per_item), self.encoder_rows, np.int32)  # past the end: dropped
        for offset, item_rows in zip(np.cumsum(per_item) - per_item, rows, strict=False):
            targets[offset : offset + len(item_rows)] = item_rows
        key = (count, tuple((name, x.shape, str(x.dtype)) for name, x in sorted(arrays.items())))
        args = (self._params, self._encoder_cache, dict(arrays), targets)
        return CompileJob(name="encode", key=key, fn=encode, args=args, donate=(1,))

    def _encode_counts(self, arrays: Mapping[str, Any]) -> tuple[int, ...]:
        """How many items of such a shape may be encoded together; ``arrays`` are those of one."""
        rows = sum(sum(counts) for counts in self.rows_per_item(arrays).values())
        return tuple(n for n in self.buckets.encode_items if n == 1 or n * rows <= MAX_ENCODE_ROWS)

    def _encode_job_of(self, shapes: MediaShapes, count: int) -> CompileJob:
        return self._encode_job(
            {name: self._shape((count, *x.shape[1:]), x.dtype) for name, x in shapes.items()}, count
        )

    def _store_job(self, embeds: np.ndarray, targets: np.ndarray) -> CompileJob:
        def store(encoder_cache, embeds, targets):
            return whole(encoder_cache.at[targets].set(embeds, mode="drop"))

        args = (self._encoder_cache, embeds, targets)
        return CompileJob(name="store", key=len(embeds), fn=store, args=args, donate=(0,))

    def _sample_job(self, logits, slots: np.ndarray, batch: SamplingBatch | None) -> CompileJob:
        choose = functools.partial(sample, num_logprobs=min(MAX_LOGPROBS, self.vocab_size))

        def run(last_tokens, logits, slots, *batch):
            details = choose(logits, *batch) if batch else None
            tokens = sample_greedy(logits) if details is None else details.token_ids
            return whole((tokens, details, last_tokens.at[slots].set(tokens, mode="drop")))

        args = (self._last_tokens, logits, slots)
        if batch is None:
            return CompileJob(name="sample_greedy", key=logits.shape[0], fn=run, args=args, donate=(0,))
        key = (logits.shape[0], batch.prompt_tokens.shape[1])
        return CompileJob(name="sample", key=key, fn=run, args=(*args, batch), donate=(0,))

    def _prompt_logprobs_job(self, hidden, rows: np.ndarray, targets: np.ndarray) -> CompileJob:
        def run(params, hidden, rows, targets):
            logits = whole(nnx.merge(self._graphdef, params).compute_logits(hidden[rows]))
            return prompt_logprobs(logits, targets, num_logprobs=min(MAX_LOGPROBS, self.vocab_size))

        args = (self._params, hidden, rows, targets)
        return CompileJob(name="prompt_logprobs", key=hidden.shape[0], fn=run, args=args)

    # Shapes and sizes.

    def num_rows(self, decode: Sequence[Rows], prefill: Sequence[Rows]) -> int:
        """Rows that `forward` computes for these, padding included."""
        num_decode, num_prefill, _ = self._batch_shape(decode, prefill)
        return num_decode + num_prefill

    def num_greedy_rows(self, num_requests: int) -> int:
        """Rows that a step of `decode` computes for so many requests, padding included."""
        return round_up(num_requests, self.buckets.greedy_requests)

    def _batch_shape(self, decode: Sequence[Rows], prefill: Sequence[Rows]) -> tuple[int, int, int]:
        return self.buckets.shape(len(decode), sum(-(-len(r) // TILE_SIZE) * TILE_SIZE for r in prefill))

    def _build(self, decode, prefill, num_decode, num_prefill, num_requests):
        return build_batch(
            decode,
            prefill,
            num_decode=num_decode,
            num_prefill=num_prefill,
            num_requests=num_requests,
            tile_size=TILE_SIZE,
            mask_kinds=tuple(self.mask_specs),
            page_size=self.page_size,
            num_pages=self.num_pages,
            max_pages=self._max_pages,
        )

    def _dummy_batch(self, num_decode: int, num_prefill: int, num_requests: int) -> ForwardBatch:
        row = Rows(
            token_ids=np.zeros(1, np.int32),
            start=0,
            prompt_length=1,
            intervals={kind: causal(1) for kind in self.mask_specs},
            positions=np.zeros((self._position_axes, 1), np.int32) if self._position_axes > 1 else None,
            pages=np.zeros(1, np.int32),
        )
        parts = ([], [row]) if num_prefill else ([row], [])
        return self._build(*parts, num_decode, num_prefill, num_requests)[0]

    def _dummy_sampling(self, rows: int, history_width: int) -> SamplingBatch:
        return build_sampling_batch([], num_rows=rows, vocab_size=self.vocab_size, history_width=history_width)

    def _store_buckets(self) -> tuple[int, ...]:
        doublings = range(4, math.ceil(math.log2(max(self.encoder_rows, 17))) + 1)
        return tuple(2**i for i in doublings)

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one runner lives as long as its engine
    def _rows_of_shapes(self, shapes) -> dict[str, tuple[int, ...]]:
        def embed(params, arrays):
            embeds = nnx.merge(self._graphdef, params).embed_multimodal(**arrays)
            return {modality: list(items) for modality, items in embeds.items()}

        arrays = {name: self._shape(shape, dtype) for name, shape, dtype in shapes}
        embeds = jax.eval_shape(embed, self._params, arrays)
        for modality, items in embeds.items():
            for item in items:
                if item.ndim != 2 or item.shape[1] != self._width:
                    raise ConfigError(
                        f"{self._model_cls.__name__}.embed_multimodal gave {modality} rows of shape {item.shape}; "
                        f"expected [rows, {self._width}]"
                    )
        return {modality: tuple(item.shape[0] for item in items) for modality, items in embeds.items()}

    def _embedding_width(self) -> int:
        ids = self._shape((1,), jnp.int32)
        return jax.eval_shape(
            lambda params, ids: nnx.merge(self._graphdef, params).embed_input_ids(ids), self._params, ids
        ).shape[-1]

    def _logits_width(self) -> int:
        hidden = self._shape((1, self._hidden_width), self._dtype)
        return jax.eval_shape(
            lambda params, x: nnx.merge(self._graphdef, params).compute_logits(x), self._params, hidden
        ).shape[-1]

    def _choose_encoder_rows(self, engine_config: EngineConfig, media_budget: int) -> int:
        if not self._multimodal:
            return 0
        asked = engine_config.encoder_cache_tokens
        if asked is None:
            return media_budget + self.buckets.prefill_tokens[-1]
        if asked < media_budget:
            raise ConfigError(
                f"encoder_cache_tokens {asked} is below the {media_budget} rows of one prompt at its limits"
            )
        return asked

    def _allocate_pages(self, engine_config: EngineConfig) -> None:
        device = jax.devices()[0]
        self._limit = memory.device_limit(device, engine_config.memory_fraction)
        page_bytes = memory.kv_bytes_per_page(self._kv_shapes, self.page_size, self._dtype.itemsize, device.platform)
        page_bytes //= 1 if self._mesh is None else self._mesh.shape[MODEL]
        self.num_pages = 1
        self._kv_caches = self._page_shapes(1, device.platform)
        used = 0
        if self._limit is not None and engine_config.kv_cache_memory is None:
            largest = self._dummy_batch(*self.buckets.shape(self.num_slots, self.buckets.prefill_tokens[-1]))
            jobs = [self._forward_job(largest)]
            jobs += [self._encode_job_of(shapes, self._encode_counts(shapes)[-1]) for shapes in self._media_shapes]
            self.programs.compile(jobs, show_progress=False)
            used = _nbytes(self._params) + _nbytes(self._encoder_cache)
            # They run one after the other: there must be room for the hungrier one.
            used += max(map(self.programs.largest_temp_bytes, ("forward", "encode")))
            # The real ones have another number of pages.
            self.programs = Programs(engine_config.on_recompile, self._mesh)
        self.num_pages = memory.num_kv_pages(
            page_bytes=page_bytes,
            page_size=self.page_size,
            max_num_seqs=engine_config.max_num_seqs,
            context_length=self.context_length,
            requested=engine_config.kv_cache_memory,
            limit=self._limit,
            used=used,
        )
        self._kv_caches = jax.tree.map(
            lambda shape: self._zeros(shape.shape, shape.dtype, BY_HEAD),
            self._page_shapes(self.num_pages, device.platform),
        )

    def _page_shapes(self, num_pages: int, platform: str) -> tuple[Any, ...]:
        return tuple(
            self._shape(pages_shape(num_pages, heads, self.page_size, head_dim, platform), self._dtype, BY_HEAD)
            for heads, head_dim in self._kv_shapes
        )

    def _kv_shapes_on_mesh(self, shapes: Sequence[tuple[int, int]], text_config: Any) -> tuple[tuple[int, int], ...]:
        """Heads and their width in the pages of each layer; with a head for every device at least."""
        if self._mesh is None:
            return tuple(shapes)
        devices = self._mesh.shape[MODEL]
        for heads, _ in shapes:
            check_heads(text_config.num_attention_heads, heads, devices)
        return tuple((max(heads, devices), head_dim) for heads, head_dim in shapes)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, spec)

    def _shape(self, shape, dtype, spec: PartitionSpec = EVERYWHERE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding(spec))

    def _zeros(self, shape, dtype, spec: PartitionSpec = EVERYWHERE) -> jax.Array:
        return jnp.zeros(shape, dtype, device=self._sharding(spec))


def _nbytes(tree) -> int:
    """On one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
