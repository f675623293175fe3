"""Which programs a model has on the device, and for which shapes. Nothing here holds an array or runs one.

    encode   media arrays           -> rows of the encoder cache
    store    precomputed embeddings -> rows of the encoder cache
    forward  a batch of rows        -> logits of each request's last row; KV pages written
    sample   logits                 -> tokens
    decode   requests               -> their next tokens, greedily, one or more of each; KV pages written

The KV cache, the encoder cache and the array of latest tokens are donated to each program that writes them. A program
is the same whether its arguments are arrays (`executor.model_runner`) or their shapes (`planning`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.batch import ForwardBatch, Rows, build_batch
from aphrodite_jax.executor.buckets import TILE_SIZE, make_buckets, round_down, round_up
from aphrodite_jax.executor.programs import CompileJob
from aphrodite_jax.executor.saved_programs import SavedPrograms, identity
from aphrodite_jax.modeling.item_rows import RowsPerItem, rows_counter
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, PagedLayout
from aphrodite_jax.modeling.models.interfaces import position_axes, supports_multimodal
from aphrodite_jax.modeling.sharding import MODEL, by_columns, check_heads, column_spec, over_items, whole, whole_rows
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.sampling import SamplingBatch, build_sampling_batch, prompt_logprobs, sample, sample_greedy
from aphrodite_jax.sampling_params import MAX_LOGPROBS
from kernels_pallas.intervals import RowIntervals, causal
from kernels_pallas.paged_attention import check_block_tables
from kernels_pallas.pages import pages_shape

__all__ = [
    "MAX_DECODE_STEPS",
    "PROMPT_LOGPROB_ROWS",
    "DeviceArrays",
    "MediaShapes",
    "ModelPrograms",
    "Representative",
    "device_bytes",
    "prefill_tokens",
]

MediaShapes = Mapping[str, jax.ShapeDtypeStruct]
"""Arrays of media by keyword, as shapes."""

PROMPT_LOGPROB_ROWS = 64
"""Rows whose prompt log-probabilities are computed at a time."""
MAX_ENCODE_ROWS = 4096
"""Rows of media that a device encodes together at most; one item may have more."""
EVERYWHERE, BY_HEAD, BY_ITEM = PartitionSpec(), PartitionSpec(None, MODEL), PartitionSpec(MODEL)
"""Where arrays lie on a mesh: whole on every device, or their heads or items divided."""
MAX_DECODE_STEPS = 8
"""Tokens of each request in one decode program at most."""
DEFAULT_PREFILL_TOKENS = 2048


def prefill_tokens(model_config: ModelConfig, engine_config: EngineConfig, media_budget: int) -> int:
    """Tokens of a prefill step: ``max_num_batched_tokens``, or what rows that see each other need, in whole tiles."""
    asked = engine_config.max_num_batched_tokens
    if asked is not None:
        return asked
    least = DEFAULT_PREFILL_TOKENS
    for spec in model_class(model_config).mask_specs(model_config.hf_config).values():
        if spec.prefix:  # the prompt is computed in one step
            least = model_config.context_length
        elif spec.bidirectional:  # and so are items that touch
            least = max(least, media_budget)
    return -(-min(least, model_config.context_length) // TILE_SIZE) * TILE_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceArrays:
    """What stays on the device between programs, as arrays or as their shapes.

    Attributes:
      params: the model's.
      kv_caches: pages ``[P, K, page_size, W]`` of each layer.
      encoder_cache: ``[rows, D]``.
      last_tokens: ``[slots]``, the latest token of each running request.
    """

    params: Any
    kv_caches: Any
    encoder_cache: Any
    last_tokens: Any

    @property
    def num_pages(self) -> int:
        """Pages of each layer."""
        return self.kv_caches[0].shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Representative:
    """The largest of some programs, and how many programs it stands for."""

    job: CompileJob
    count: int


class ModelPrograms:
    """The programs of one model on one device, or on the devices of a mesh.

    Args:
      model: the nnx module, with weights or with their shapes.
      model_config, engine_config: as given by the user.
      media_budget: rows that the media of one prompt at its limits take; 0 for a text model.
      max_num_batched_tokens: tokens of a prefill step.
      media_shapes: gives the arrays of one item for each shape in which media are encoded, from `rows_per_item`; it is
        asked where programs are compiled ahead.
      mesh: the devices that the model's weights are divided over; None for one device.
      platform: of the devices, "tpu", "gpu" or "cpu".

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
        platform: str,
    ):
        hf_config = model_config.hf_config
        self.graphdef: Any
        self.graphdef, self.params = nnx.split(model)
        self.mesh = mesh
        self.by_items = engine_config.encoder_parallel == "items"
        self.model_cls = type(model)
        self._multimodal = supports_multimodal(type(model))
        self.rows_per_item: RowsPerItem = rows_counter(model)
        self._position_axes = position_axes(type(model))
        self.mask_specs = type(model).mask_specs(hf_config)
        self.buckets = make_buckets(engine_config.max_num_seqs, max_num_batched_tokens, engine_config.max_encode_items)
        self.page_size = engine_config.page_size
        self.context_length = model_config.context_length
        self.max_pages = -(-self.context_length // self.page_size)
        self.dtype = jax.tree.leaves(self.params)[0].dtype
        self.width = self._embedding_width()  # which may be more than the hidden states have
        self._hidden_width = model_config.hf_text_config.hidden_size
        self.vocab_size = self._logits_width()
        self.encoder_rows = self._choose_encoder_rows(engine_config, media_budget)
        self.num_slots = engine_config.max_num_seqs
        self.kv_shapes = self._kv_shapes_on_mesh(type(model).kv_cache_shapes(hf_config), model_config.hf_text_config)
        self._platform = platform
        self._find_media_shapes = media_shapes

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.kv_shapes)

    @property
    def _devices(self) -> int:
        """That the model is divided over."""
        return 1 if self.mesh is None else self.mesh.shape[MODEL]

    @functools.cached_property
    def media_shapes(self) -> Sequence[MediaShapes]:
        """Arrays of one item, for each shape in which media are encoded."""
        return self._find_media_shapes(self.rows_per_item) if self._multimodal else ()

    def arrays(self, num_pages: int) -> DeviceArrays:
        """What stays on the device, with ``num_pages`` pages: the parameters as they are, all else as shapes."""
        return DeviceArrays(
            params=self.params,
            kv_caches=tuple(
                self.shape(pages_shape(num_pages, heads, self.page_size, head_dim, self._platform), self.dtype, BY_HEAD)
                for heads, head_dim in self.kv_shapes
            ),
            encoder_cache=self.shape(
                (max(self.encoder_rows, 1), self.width), self.dtype, column_spec(self.width, self._devices)
            ),
            last_tokens=self.shape((self.num_slots,), jnp.int32),
        )

    def saved_programs(self, model_config: ModelConfig, engine_config: EngineConfig) -> SavedPrograms | None:
        """Where the programs are kept compiled; None where they are not.

        Raises:
          ConfigError: the directory can't be written.
        """
        if engine_config.programs_dir is None:
            return None
        devices = jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
        made_for = identity(self.model_cls, self.dtype, model_config, engine_config, self.mesh)
        return SavedPrograms(engine_config.programs_dir, made_for, devices)

    # Lists of programs.

    def all_jobs(self, arrays: DeviceArrays) -> list[CompileJob]:
        """Every program of every bucket."""
        logits = [self.shape((n, self.vocab_size), jnp.float32) for n in self.buckets.decode_requests]
        jobs = [self.sample_job(arrays, x, np.zeros(len(x), np.int32), None) for x in logits]
        jobs += [
            self.sample_job(arrays, x, np.zeros(len(x), np.int32), self._dummy_sampling(len(x), width))
            for x in logits
            for width in (0, self.context_length)  # without and with penalties
        ]
        jobs += [self.forward_job_of(arrays, shape) for shape in self.buckets.shapes()]
        jobs += [self.decode_job_of(arrays, n) for n in self.buckets.greedy_requests]
        jobs += [
            self.encode_job_of(arrays, shapes, n) for shapes in self.media_shapes for n in self._encode_counts(shapes)
        ]
        if self._multimodal:
            jobs += [
                self.store_job(arrays, np.zeros((rows, self.width), self.dtype), np.zeros(rows, np.int32))
                for rows in self._store_buckets()
            ]
        rows = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
        jobs += [
            self.prompt_logprobs_job(arrays, self.shape((tokens, self._hidden_width), self.dtype), rows, rows)
            for tokens in self.buckets.prefill_tokens
        ]
        return jobs

    @property
    def largest_forward(self) -> tuple[int, int, int]:
        """Rows of decode, rows of prompts and requests of the largest forward program."""
        return self.buckets.shape(self.num_slots, self.buckets.prefill_tokens[-1])

    def representatives(self, arrays: DeviceArrays) -> list[Representative]:
        """The largest program of each kind: what it takes to run, and to be held ready, the others of its kind don't
        exceed by much."""
        shapes = self.buckets.shapes()
        without_prompts = sum(tokens == 0 for _, tokens, _ in shapes)
        greedy, sampled = len(self.buckets.greedy_requests), len(self.buckets.decode_requests)
        requests = self.buckets.decode_requests[-1]
        logits = self.shape((requests, self.vocab_size), jnp.float32)
        found = [
            Representative(job=self.forward_job_of(arrays, self.largest_forward), count=len(shapes) - without_prompts),
            # Those of forward that have no prompts compute what the greedy ones do.
            Representative(job=self.decode_job_of(arrays, self.num_slots), count=greedy + without_prompts),
            Representative(
                job=self.sample_job(
                    arrays, logits, np.zeros(requests, np.int32), self._dummy_sampling(requests, self.context_length)
                ),
                # Greedy, without and with penalties; log-probabilities of prompts are as large.
                count=3 * sampled + len(self.buckets.prefill_tokens),
            ),
        ]
        kinds: dict[tuple[str, ...], list[tuple[MediaShapes, int]]] = {}
        for media in self.media_shapes:  # arrays of the same names differ in nothing but their size
            kinds.setdefault(tuple(sorted(media)), []).extend((media, n) for n in self._encode_counts(media))
        for programs in kinds.values():
            media, count = max(programs, key=lambda x: x[1] * sum(math.prod(array.shape) for array in x[0].values()))
            found.append(Representative(job=self.encode_job_of(arrays, media, count), count=len(programs)))
        if self._multimodal:
            rows = self._store_buckets()[-1]
            store = self.store_job(arrays, np.zeros((rows, self.width), self.dtype), np.zeros(rows, np.int32))
            found.append(Representative(job=store, count=len(self._store_buckets())))
        return found

    # Programs: each method says what one takes, for a run and for compiling ahead alike.

    def forward_job(self, arrays: DeviceArrays, batch: ForwardBatch) -> CompileJob:
        """Rows of requests through the model."""
        paged = batch.metadata.paged
        assert paged is not None
        num_decode = paged.decode_rows

        def forward(params, kv_caches, encoder_cache, last_tokens, batch):
            model = nnx.merge(self.graphdef, params)
            latest = last_tokens[jnp.maximum(batch.token_slots, 0)]
            input_ids = jnp.where(batch.token_slots >= 0, latest, batch.input_ids)
            embeds = model.embed_input_ids(input_ids)
            if self._multimodal:
                media = whole_rows(encoder_cache[jnp.maximum(batch.media_rows, 0)])
                embeds = jnp.where((batch.media_rows >= 0)[:, None], media, embeds)
            hidden, kv_caches = model(input_ids, batch.positions, kv_caches, batch.metadata, inputs_embeds=embeds)
            return whole_rows(model.compute_logits(hidden[batch.last_rows])), whole(hidden[num_decode:]), kv_caches

        key = (num_decode, len(batch.input_ids) - num_decode, len(batch.last_rows))
        args = (arrays.params, arrays.kv_caches, arrays.encoder_cache, arrays.last_tokens, batch)
        return CompileJob(name="forward", key=key, fn=forward, args=args, donate=(1,))

    def decode_job(
        self, arrays: DeviceArrays, slots, places, offsets, tables, num_steps: int, size: int | None = None
    ) -> CompileJob:
        """The next tokens of requests, greedily; arrays of `decode_arrays`."""
        size = self.num_greedy_rows(len(slots)) if size is None else size
        padding = size - len(slots)
        num_pages = arrays.num_pages
        requests = (
            np.pad(slots, (0, padding), constant_values=self.num_slots),
            np.pad(places, (0, padding)),
            np.pad(offsets, (0, padding)),
            np.pad(tables, ((0, padding), (0, 0))),
        )

        def decode(params, kv_caches, last_tokens, slots, places, offsets, tables, num_steps):
            model = nnx.merge(self.graphdef, params)

            def step(i, carry):
                kv_caches, tokens, chosen = carry
                metadata = self._decode_metadata(slots, places + i, tables, num_pages)
                positions = places + offsets + i
                if self._position_axes > 1:
                    positions = jnp.broadcast_to(positions, (self._position_axes, len(slots)))
                embeds = model.embed_input_ids(tokens)
                hidden, kv_caches = model(tokens, positions, kv_caches, metadata, inputs_embeds=embeds)
                tokens = sample_greedy(whole_rows(model.compute_logits(hidden)))
                return kv_caches, tokens, chosen.at[i].set(tokens)

            tokens = last_tokens[jnp.minimum(slots, self.num_slots - 1)]
            chosen = jnp.zeros((MAX_DECODE_STEPS, len(slots)), jnp.int32)
            kv_caches, tokens, chosen = jax.lax.fori_loop(0, num_steps, step, (kv_caches, tokens, chosen))
            return whole(chosen), whole(last_tokens.at[slots].set(tokens, mode="drop")), kv_caches

        args = (arrays.params, arrays.kv_caches, arrays.last_tokens, *requests, np.int32(num_steps))
        return CompileJob(name="decode", key=size, fn=decode, args=args, donate=(1, 2))

    def _decode_metadata(self, slots, places, tables, num_pages: int) -> AttentionMetadata:
        """What attention must know of one row of each request, on the device; requests without a slot see nothing."""
        there = slots < self.num_slots
        page = jnp.take_along_axis(tables, (places // self.page_size)[:, None], axis=1)[:, 0]
        stop = jnp.where(there, places + 1, 0)
        intervals = {
            kind: RowIntervals(jnp.maximum(stop - spec.window, 0) if spec.window else jnp.zeros_like(stop), stop)
            for kind, spec in self.mask_specs.items()
        }
        requests = jnp.arange(len(slots), dtype=jnp.int32)
        at = jnp.where(there, page * self.page_size + places % self.page_size, num_pages * self.page_size)
        paged = PagedLayout(slots=at, block_tables=tables, tile_request=requests, decode_rows=len(slots))
        return AttentionMetadata(intervals=intervals, lengths=jnp.maximum(stop, 1), paged=paged)

    def decode_arrays(self, slots, places, offsets, pages, num_pages: int):
        """Requests as the arrays of `decode_job`, their pages as block tables."""
        tables = np.zeros((len(slots), self.max_pages), np.int32)
        for table, held in zip(tables, pages, strict=True):
            table[: len(held)] = held
        check_block_tables(tables, num_pages)
        return np.array(slots, np.int32), np.array(places, np.int32), np.array(offsets, np.int32), tables

    def encode_job(
        self, arrays: DeviceArrays, media: Mapping[str, Any], count: int, rows: Sequence[np.ndarray] = ()
    ) -> CompileJob:
        """Media of ``count`` items into ``rows[i]`` of the encoder cache, filled up to a bucket."""
        media, count = self._filled_up(media, count)

        def embed(params, media):
            embeds = nnx.merge(self.graphdef, params).embed_multimodal(**media)
            return {modality: jnp.stack(list(items)) for modality, items in embeds.items() if len(items)}

        def encode(params, encoder_cache, media, targets):
            embeds = over_items(embed, params, media) if self.by_items else whole(embed(params, media))
            rows = [by_columns(items.reshape(-1, items.shape[-1])) for items in embeds.values()]
            made = jnp.concatenate(rows).astype(encoder_cache.dtype)
            return by_columns(encoder_cache.at[targets].set(made, mode="drop"))

        per_item = [n for counts in self.rows_per_item(media).values() for n in counts]
        targets = np.full(sum(per_item), self.encoder_rows, np.int32)  # past the end: dropped
        for offset, item_rows in zip(np.cumsum(per_item) - per_item, rows, strict=False):
            targets[offset : offset + len(item_rows)] = item_rows
        key = (count, tuple((name, x.shape, str(x.dtype)) for name, x in sorted(media.items())))
        args = (arrays.params, arrays.encoder_cache, media, targets)
        return CompileJob(name="encode", key=key, fn=encode, args=args, donate=(1,))

    def encode_part(self, media: Mapping[str, Any], count: int) -> int:
        """How many of ``count`` items with arrays such as ``media`` are encoded next, in a bucket that they fill.

        Of the smallest bucket that is asked of one device alone: others have something to do or not.
        """
        counts = self._encode_counts(media)
        return count if count <= counts[0] else round_down(count, counts)

    def _encode_counts(self, media: Mapping[str, Any]) -> tuple[int, ...]:
        """How many items of such a shape may be encoded together; ``media`` are those of one.

        Where each device encodes items of its own, as many for each.
        """
        rows = sum(sum(counts) for counts in self.rows_per_item(media).values())
        of_each = sorted({-(-n // self._encoders) for n in self.buckets.encode_items})
        return tuple(n * self._encoders for n in of_each if n == 1 or n * rows <= MAX_ENCODE_ROWS)

    @property
    def _encoders(self) -> int:
        """Devices that encode different items at the same time."""
        return self._devices if self.by_items else 1

    def _filled_up(self, media: Mapping[str, Any], count: int) -> tuple[dict[str, Any], int]:
        """Arrays of as many items as the encoders take, each with its own; items that are nothing behind the others."""
        missing, sharding = -count % self._encoders, self.sharding(BY_ITEM)
        is_bucket = any(isinstance(x, jax.ShapeDtypeStruct) for x in media.values())
        if self._encoders == 1 or sharding is None or is_bucket:
            assert not missing, "shapes are those of a bucket"
            return dict(media), count
        filled = {name: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for name, x in media.items()}
        placed = {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in filled.items()}
        return placed, count + missing

    def encode_job_of(self, arrays: DeviceArrays, shapes: MediaShapes, count: int) -> CompileJob:
        """The encode program for ``count`` items whose arrays ``[1, ...]`` have these shapes."""
        count += -count % self._encoders
        spec = BY_ITEM if self._encoders > 1 else EVERYWHERE
        media = {name: self.shape((count, *x.shape[1:]), x.dtype, spec) for name, x in shapes.items()}
        return self.encode_job(arrays, media, count)

    def store_job(self, arrays: DeviceArrays, embeds: np.ndarray, targets: np.ndarray) -> CompileJob:
        """Embeddings into the encoder cache."""

        def store(encoder_cache, embeds, targets):
            return by_columns(encoder_cache.at[targets].set(embeds, mode="drop"))

        args = (arrays.encoder_cache, embeds, targets)
        return CompileJob(name="store", key=len(embeds), fn=store, args=args, donate=(0,))

    def sample_job(self, arrays: DeviceArrays, logits, slots: np.ndarray, batch: SamplingBatch | None) -> CompileJob:
        """Tokens for rows of logits; without a batch greedily."""
        choose = functools.partial(sample, num_logprobs=min(MAX_LOGPROBS, self.vocab_size))

        def run(last_tokens, logits, slots, *batch):
            details = choose(logits, *batch) if batch else None
            tokens = sample_greedy(logits) if details is None else details.token_ids
            return whole((tokens, details, last_tokens.at[slots].set(tokens, mode="drop")))

        args = (arrays.last_tokens, logits, slots)
        if batch is None:
            return CompileJob(name="sample_greedy", key=logits.shape[0], fn=run, args=args, donate=(0,))
        key = (logits.shape[0], batch.prompt_tokens.shape[1])
        return CompileJob(name="sample", key=key, fn=run, args=(*args, batch), donate=(0,))

    def prompt_logprobs_job(self, arrays: DeviceArrays, hidden, rows: np.ndarray, targets: np.ndarray) -> CompileJob:
        """Log-probabilities of prompt tokens."""

        def run(params, hidden, rows, targets):
            logits = whole_rows(nnx.merge(self.graphdef, params).compute_logits(hidden[rows]))
            return prompt_logprobs(logits, targets, num_logprobs=min(MAX_LOGPROBS, self.vocab_size))

        args = (arrays.params, hidden, rows, targets)
        return CompileJob(name="prompt_logprobs", key=hidden.shape[0], fn=run, args=args)

    def forward_job_of(self, arrays: DeviceArrays, shape: tuple[int, int, int]) -> CompileJob:
        """The forward program of a bucket: rows of decode, rows of prompts, requests."""
        row = Rows(
            token_ids=np.zeros(1, np.int32),
            start=0,
            prompt_length=1,
            intervals={kind: causal(1) for kind in self.mask_specs},
            positions=np.zeros((self._position_axes, 1), np.int32) if self._position_axes > 1 else None,
            pages=np.zeros(1, np.int32),
        )
        parts = ([], [row]) if shape[1] else ([row], [])
        return self.forward_job(arrays, self.build(*parts, *shape, num_pages=arrays.num_pages)[0])

    def decode_job_of(self, arrays: DeviceArrays, size: int) -> CompileJob:
        """The decode program of a bucket."""
        return self.decode_job(arrays, *self.decode_arrays((), (), (), (), arrays.num_pages), 1, size)

    def _dummy_sampling(self, rows: int, history_width: int) -> SamplingBatch:
        return build_sampling_batch([], num_rows=rows, vocab_size=self.vocab_size, history_width=history_width)

    # Shapes and sizes.

    def num_greedy_rows(self, num_requests: int) -> int:
        """Rows that a step of decode computes for so many requests, padding included."""
        return round_up(num_requests, self.buckets.greedy_requests)

    def batch_shape(self, decode: Sequence[Rows], prefill: Sequence[Rows]) -> tuple[int, int, int]:
        """Of the bucket: rows of decode, rows of prompts, requests."""
        return self.buckets.shape(len(decode), sum(-(-len(r) // TILE_SIZE) * TILE_SIZE for r in prefill))

    def build(
        self,
        decode: Sequence[Rows],
        prefill: Sequence[Rows],
        num_decode: int,
        num_prefill: int,
        num_requests: int,
        *,
        num_pages: int,
    ) -> tuple[ForwardBatch, np.ndarray]:
        """`build_batch` for this model."""
        return build_batch(
            decode,
            prefill,
            num_decode=num_decode,
            num_prefill=num_prefill,
            num_requests=num_requests,
            tile_size=TILE_SIZE,
            mask_kinds=tuple(self.mask_specs),
            page_size=self.page_size,
            num_pages=num_pages,
            max_pages=self.max_pages,
        )

    def store_size(self, rows: int) -> int:
        """Rows of the store program for so many."""
        return round_up(rows, self._store_buckets())

    def shape(self, shape, dtype, spec: PartitionSpec = EVERYWHERE) -> jax.ShapeDtypeStruct:
        """An array on the mesh."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(spec))

    def sharding(self, spec: PartitionSpec = EVERYWHERE) -> NamedSharding | None:
        """Where an array lies on the mesh; None without one."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def _store_buckets(self) -> tuple[int, ...]:
        doublings = range(4, math.ceil(math.log2(max(self.encoder_rows, 17))) + 1)
        return tuple(2**i for i in doublings)

    def _embedding_width(self) -> int:
        ids = self.shape((1,), jnp.int32)
        return jax.eval_shape(
            lambda params, ids: nnx.merge(self.graphdef, params).embed_input_ids(ids), self.params, ids
        ).shape[-1]

    def _logits_width(self) -> int:
        hidden = self.shape((1, self._hidden_width), self.dtype)
        return jax.eval_shape(
            lambda params, x: nnx.merge(self.graphdef, params).compute_logits(x), self.params, hidden
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

    def _kv_shapes_on_mesh(self, shapes: Sequence[tuple[int, int]], text_config: Any) -> tuple[tuple[int, int], ...]:
        """Heads and their width in the pages of each layer; with a head for every device at least."""
        if self._devices == 1:
            return tuple(shapes)
        for heads, _ in shapes:
            check_heads(text_config.num_attention_heads, heads, self._devices)
        return tuple((max(heads, self._devices), head_dim) for heads, head_dim in shapes)


def device_bytes(tree: Any) -> int:
    """Bytes that arrays, or arrays of these shapes, take on one device."""

    def size(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
