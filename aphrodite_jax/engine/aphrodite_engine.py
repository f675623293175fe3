"""The engine: requests in, steps, answers out.

add_request   tokenize, process, map, check; one sequence per answer is queued
step          schedule, encode, send the programs to the device; take in the tokens of the step before
abort_request

The host is one step ahead: while the device runs a step, the next is planned and sent, and what the device chose comes
back one step late. A sequence that turns out to have ended has a row too many in the step behind, which is dropped. A
request with penalties, whose next token hangs on those before in the host's hands, makes the host wait instead.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.engine.admission import Prompt, PromptPreparer
from aphrodite_jax.engine.block_manager import BlockManager
from aphrodite_jax.engine.detokenizer import Detokenizer
from aphrodite_jax.engine.encoder_cache import EncoderCache
from aphrodite_jax.engine.output import LogprobReader, request_output
from aphrodite_jax.engine.profiling import media_shapes, media_tokens_per_prompt
from aphrodite_jax.engine.scheduler import Chunk, Plan, Scheduler
from aphrodite_jax.engine.sequence import PreparedPrompt, Sequence, SequenceStatus, num_values
from aphrodite_jax.engine.stats import EngineStats, clock
from aphrodite_jax.errors import RequestError
from aphrodite_jax.executor.batch import Rows
from aphrodite_jax.executor.buckets import TILE_SIZE
from aphrodite_jax.executor.mesh import make_mesh
from aphrodite_jax.executor.model_runner import MAX_DECODE_STEPS, ModelRunner
from aphrodite_jax.inputs import end_token_ids, load_tokenizer
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.outputs import RequestOutput
from aphrodite_jax.sampling import (
    SampledTokens,
    SamplingBatch,
    SamplingRow,
    build_sampling_batch,
    check_sampling_params,
    is_plain_greedy,
    uses_history,
)
from aphrodite_jax.sampling_params import SamplingParams

__all__ = ["AphroditeEngine"]

DEFAULT_PREFILL_TOKENS = 2048


@dataclasses.dataclass(kw_only=True)
class _Request:
    """A request that runs: its sequences, and the log-probabilities of its prompt so far."""

    request_id: str
    prompt: PreparedPrompt
    params: SamplingParams
    sequences: tuple[Sequence, ...]
    prompt_logprobs: list | None = None
    incremental: bool = True
    arrived: float = 0.0
    last_token: float | None = None  # when it came, of any of the sequences


@dataclasses.dataclass(kw_only=True)
class _Sent:
    """A step on the device: its plan, the tokens to come ``[steps, R]`` or ``[R]``, and what else is told of them."""

    plan: Plan
    tokens: Any = None
    details: SampledTokens | None = None


class AphroditeEngine:
    """Serves requests to one model by continuous batching.

    Args:
      model_config: the model; weights are loaded here.
      engine_config: how to run it.

    Raises:
      ConfigError, CheckpointError: the model can't be run as asked.
    """

    def __init__(self, model_config: ModelConfig, engine_config: EngineConfig | None = None):
        self.model_config = model_config
        self.engine_config = engine_config = engine_config or EngineConfig()
        media_budget = media_tokens_per_prompt(model_config)
        self.tokenizer = load_tokenizer(model_config)
        self.end_token_ids = end_token_ids(model_config, self.tokenizer)
        mesh = make_mesh(engine_config.tensor_parallel_size)
        self.runner = ModelRunner(
            load_model(model_config, mesh),
            model_config,
            engine_config,
            media_budget=media_budget,
            max_num_batched_tokens=self._prefill_tokens(media_budget),
            media_shapes=functools.partial(media_shapes, model_config),
            mesh=mesh,
        )
        if engine_config.warm_up:
            self.runner.warm_up(show_progress=engine_config.show_progress)
        self.scheduler = Scheduler(
            BlockManager(self.runner.num_pages, self.runner.page_size),
            EncoderCache(self.runner.encoder_rows),
            max_num_seqs=engine_config.max_num_seqs,
            token_budget=self.runner.buckets.prefill_tokens[-1],
            tile_size=TILE_SIZE,
            prefix_caching=engine_config.prefix_caching,
        )
        self.stats = EngineStats()
        self._sent: collections.deque[_Sent] = collections.deque()
        self._prepare = PromptPreparer(
            model_config,
            self.tokenizer,
            mask_specs=self.runner.mask_specs,
            rows_per_item=self.runner.rows_per_item,
            vocab_size=self.runner.vocab_size,
            max_tokens=model_config.context_length,
            max_media_rows=self.runner.encoder_rows,
        )
        self._logprobs = LogprobReader(self.tokenizer)
        self._requests: dict[str, _Request] = {}
        self._num_requests = 0

    # Requests.

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        incremental: bool = True,
    ) -> None:
        """Prepare a prompt and queue it.

        Args:
          request_id: names the request's outputs; not in use.
          prompt: text, or a dict with ``prompt`` or ``prompt_token_ids``, and ``multi_modal_data``.
          incremental: whether `step` gives an output each time the request has moved on; else once, at its end, which
            spares the text in between.

        Raises:
          RequestError: this request can't be served; the engine and all others go on.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        arrived = clock()
        self._add(request_id, self.prepare(prompt), sampling_params, arrived, incremental)

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """A prompt made ready for `add_prepared`; several threads may call this at a time, ahead of the device.

        Raises:
          RequestError: the prompt can't be served.
        """
        return self._prepare(prompt)

    def add_prepared(
        self,
        request_id: str,
        prepared: PreparedPrompt,
        sampling_params: SamplingParams | None = None,
        *,
        incremental: bool = True,
    ) -> None:
        """Queue a prompt that `prepare` made; Args and Raises as `add_request`."""
        self._add(request_id, prepared, sampling_params, clock(), incremental)

    def _add(
        self,
        request_id: str,
        prepared: PreparedPrompt,
        params: SamplingParams | None,
        arrived: float,
        incremental: bool,
    ) -> None:
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        params = params or SamplingParams()
        check_sampling_params(params, vocab_size=self.runner.vocab_size, end_token_ids=tuple(self.end_token_ids))
        number, self._num_requests = self._num_requests, self._num_requests + 1
        sequences = tuple(
            self._sequence(f"{request_id}/{index}", prepared, params, (number, index)) for index in range(params.n)
        )
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._requests[request_id] = _Request(
            request_id=request_id,
            prompt=prepared,
            params=params,
            sequences=sequences,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            incremental=incremental,
            arrived=arrived,
        )
        self.stats.requests += 1

    def _sequence(
        self, sequence_id: str, prepared: PreparedPrompt, params: SamplingParams, number: tuple[int, int]
    ) -> Sequence:
        """Of answer ``number[1]`` to request ``number[0]``."""
        return Sequence(
            sequence_id,
            prepared,
            params,
            seed=_seed(params.seed, self.model_config.seed, *number),
            mask_specs=self.runner.mask_specs,
            detokenizer=Detokenizer(self.tokenizer, skip_special_tokens=params.skip_special_tokens, stop=params.stop),
            max_length=min(len(prepared.token_ids) + params.max_tokens, self.runner.context_length),
            ends_by_length=_ends_by_length(params),
        )

    def preview(self, prepared: PreparedPrompt) -> list[tuple[int, int]]:
        """The chunks ``[begin, end)`` in which a prompt would be computed now if it came alone; changes nothing.

        The first begins behind the pages that hold the prompt's first tokens already.

        Raises:
          RequestError: rows that see each other don't fit in one step.
        """
        return self.scheduler.preview(self._sequence("preview", prepared, SamplingParams(), (0, 0)))

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Stop a request and free what it holds; what it has so far, or None where the id is not in use."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                self._finish(sequence, "abort")
        del self._requests[request_id]
        self.stats.finished += 1
        return self._output(request)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests)

    def describe_stats(self) -> dict[str, Any]:
        """`EngineStats` as plain values, and how the caches are doing now."""
        blocks = self.scheduler.blocks
        return self.stats.as_dict(
            {
                "prompt_tokens_cached": self.scheduler.num_cached_tokens,
                "preemptions": self.scheduler.num_preemptions,
                "pages": blocks.num_pages,
                "pages_in_use": blocks.num_pages - blocks.num_free_pages,
                "programs": len(self.runner.programs.table()),
                "late_compiles": self.runner.programs.late_compiles,
            }
        )

    def reset_caches(self) -> None:
        """Forget encoded media and pages that no running request needs; an idle engine is then as at the start."""
        self.scheduler.encoder_cache.discard_unpinned()
        self.scheduler.blocks.forget_idle()

    @property
    def num_unfinished_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def step(self, max_decode_steps: int = 1) -> list[RequestOutput]:
        """Send one step and take in the one before; the outputs of the requests that it moved on.

        Args:
          max_decode_steps: tokens of each request that the step may compute, up to `MAX_DECODE_STEPS`, where all of
            them are greedy and end by their length alone. More is less work for the host; who comes meanwhile waits.
        """
        if not 1 <= max_decode_steps <= MAX_DECODE_STEPS:
            raise ValueError(f"max_decode_steps must be from 1 to {MAX_DECODE_STEPS}, got {max_decode_steps}")
        with jax.profiler.StepTraceAnnotation("engine step", step_num=self.stats.steps):
            return self._step(max_decode_steps)

    def _step(self, max_decode_steps: int) -> list[RequestOutput]:
        begin = clock()
        waited, moved = self.stats.wait, []
        if self._sent and any(uses_history(sequence.params) for sequence in self.scheduler.running):
            moved += self._take_in()
        with jax.profiler.TraceAnnotation("plan and send"):
            plan = self.scheduler.schedule(max_decode_steps)
            if plan is not None:
                self._sent.append(self._send(plan))
        if plan is None and not self._sent and not moved and self._requests:
            raise RuntimeError(f"no step can be planned, though {len(self._requests)} requests wait")
        while len(self._sent) > (plan is not None):
            moved += self._take_in()
        outputs = self._collect(moved)
        took = clock() - begin
        self.stats.step += took
        self.stats.plan += took - (self.stats.wait - waited)
        return outputs

    # A step's parts.

    def _send(self, plan: Plan) -> _Sent:
        """Start the programs of a step."""
        self._encode(plan)
        plain = all(is_plain_greedy(chunk.sequence.params) for chunk in plan.chunks if chunk.samples)
        if plain and not plan.prefill and all(c.begin >= c.sequence.prompt_length for c in plan.decode):
            sequences = [chunk.sequence for chunk in plan.decode]
            tokens = self.runner.decode(
                [sequence.slot for sequence in sequences],
                [chunk.begin for chunk in plan.decode],
                [sequence.prompt.position_offset for sequence in sequences],
                [self.scheduler.blocks.block_table(sequence.sequence_id) for sequence in sequences],
                plan.num_steps,
            )
            self._count(plan, self.runner.num_greedy_rows(len(sequences)) * plan.num_steps)
            self.scheduler.sent(plan)
            return _Sent(plan=plan, tokens=tokens)
        decode, prefill = ([self._rows(chunk) for chunk in chunks] for chunks in (plan.decode, plan.prefill))
        logits, hidden, offsets = self.runner.forward(decode, prefill)
        self._count(plan, self.runner.num_rows(decode, prefill))
        for chunk, offset in zip(plan.prefill, offsets, strict=True):
            self._take_prompt_logprobs(chunk, hidden, offset)
        sent = _Sent(plan=plan)
        if any(chunk.samples for chunk in plan.chunks):
            slots = np.full(logits.shape[0], self.runner.num_slots, np.int32)
            for row, chunk in enumerate(plan.chunks):
                if chunk.samples:
                    slots[row] = chunk.sequence.slot
            batch = None if plain else self._sampling_batch(plan, logits.shape[0])
            tokens, details = self.runner.sample(logits, slots, batch)
            sent = _Sent(plan=plan, tokens=tokens, details=details)
        self.scheduler.sent(plan)
        return sent

    def _take_in(self) -> list[Sequence]:
        """Wait for the oldest step on the device and take its tokens; the sequences that have one more."""
        sent = self._sent.popleft()
        begin = clock()
        with jax.profiler.TraceAnnotation("wait"):
            tokens, details = jax.device_get((sent.tokens, sent.details))
        tokens = np.atleast_2d(tokens)
        self.stats.wait += clock() - begin
        moved = []
        for step in range(sent.plan.num_steps):
            for row, chunk in enumerate(sent.plan.chunks):
                if chunk.samples:
                    chunk.sequence.num_pending -= 1
                    if chunk.sequence.status is not SequenceStatus.FINISHED:
                        self._take_token(chunk.sequence, int(tokens[step, row]), details, row)
                        moved.append(chunk.sequence)
        for sequence in moved:
            self.scheduler.publish(sequence)
        return moved

    def _count(self, plan: Plan, num_rows: int) -> None:
        """``num_rows`` are those that the device computes, padding included."""
        stats = self.stats
        rows = sum(map(len, plan.chunks)) + len(plan.decode) * (plan.num_steps - 1)
        stats.steps += 1
        stats.decode_steps += plan.num_steps * bool(plan.decode)
        stats.rows += rows
        stats.padded_rows += num_rows - rows
        for chunk in plan.chunks:
            sequence = chunk.sequence
            in_prompt = max(0, min(chunk.end, sequence.prompt_length) - chunk.begin)
            stats.prompt_tokens_computed += in_prompt
            if chunk.begin == sequence.num_cached and in_prompt:
                stats.prompt_tokens += sequence.prompt_length
                stats.media_items += len(sequence.prompt.media)
        stats.media_encoded += len(plan.encode)

    def _encode(self, plan: Plan) -> None:
        """Media of one shape go together; embeddings that the user computed are stored as they are."""
        by_shape: dict[tuple, list] = {}
        for item, rows in plan.encode:
            if item.embeds is not None:
                self.runner.store(item.embeds, rows)
            elif item.mm_kwargs is not None:
                self.stats.media_values += item.num_values
                self.stats.media_padding += num_values(item.mm_kwargs) - item.num_values
                shape = tuple((name, array.shape) for name, array in sorted(item.mm_kwargs.items()))
                by_shape.setdefault((item.modality, shape), []).append((item.mm_kwargs, rows))
        for group in by_shape.values():
            self.runner.encode([mm_kwargs for mm_kwargs, _ in group], [rows for _, rows in group])

    def _rows(self, chunk: Chunk) -> Rows:
        sequence, begin, end = chunk.sequence, chunk.begin, chunk.end
        return Rows(
            token_ids=sequence.tokens(begin, end),
            start=begin,
            prompt_length=sequence.prompt_length,
            intervals=sequence.intervals(begin, end),
            positions=sequence.positions(begin, end),
            pages=self.scheduler.blocks.block_table(sequence.sequence_id),
            media_rows=self._media_rows(sequence, begin, end),
            slot=sequence.slot,
        )

    def _media_rows(self, sequence: Sequence, begin: int, end: int) -> np.ndarray | None:
        if not sequence.prompt.media or begin >= sequence.prompt_length:
            return None
        media_rows = np.full(end - begin, -1, np.int32)
        for item in sequence.prompt.media:
            if item.placeholder.offset < end and begin < item.placeholder.stop:
                rows = self.scheduler.encoder_cache.lookup(item.content_hash)
                assert rows is not None, "a running sequence's media are pinned"
                tokens = item.placeholder.row_tokens
                first, last = np.searchsorted(tokens, (begin, end))
                media_rows[tokens[first:last] - begin] = rows[first:last]
        return media_rows

    def _sampling_batch(self, plan: Plan, num_rows: int) -> SamplingBatch:
        rows = [self._sampling_row(chunk.sequence) for chunk in plan.chunks]
        return build_sampling_batch(
            rows,
            num_rows=num_rows,
            vocab_size=self.runner.vocab_size,
            history_width=self.runner.context_length if any(uses_history(row.params) for row in rows) else 0,
        )

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        return SamplingRow(
            params=sequence.params,
            seed=sequence.seed,
            prompt_token_ids=sequence.prompt.token_ids,
            output_token_ids=sequence.output_ids,
            num_pending=sequence.num_pending,
            end_token_ids=() if sequence.params.ignore_eos else tuple(self.end_token_ids),
        )

    def _take_token(self, sequence: Sequence, token: int, sampled: SampledTokens | None, row: int) -> None:
        params = sequence.params
        sequence.output_ids.append(token)
        self._count_token(self._requests[sequence.sequence_id.rpartition("/")[0]])
        if params.logprobs is not None:
            assert sampled is not None, "a request that asks for log-probabilities is not plain greedy"
            sequence.logprobs.append(self._logprobs.read(sampled, row, token, params.logprobs))
            sequence.cumulative_logprob += float(sampled.logprobs[row])
        if token in self.end_token_ids and not params.ignore_eos:
            self._finish(sequence, "stop")
        elif token in params.stop_token_ids:
            self._finish(sequence, "stop", token)
        elif (stop := sequence.detokenizer.append(token)) is not None:
            self._finish(sequence, "stop", stop)
        elif sequence.num_known >= sequence.max_length:
            self._finish(sequence, "length")

    def _count_token(self, request: _Request) -> None:
        now = clock()
        self.stats.output_tokens += 1
        if request.last_token is None:
            self.stats.time_to_first_token.add(now - request.arrived)
        else:
            self.stats.time_between_tokens.add(now - request.last_token)
        request.last_token = now

    def _take_prompt_logprobs(self, chunk: Chunk, hidden, offset: int) -> None:
        sequence = chunk.sequence
        request = self._requests[sequence.sequence_id.rpartition("/")[0]]
        count = request.params.prompt_logprobs
        if count is None or request.prompt_logprobs is None or sequence is not request.sequences[0]:
            return
        first = len(request.prompt_logprobs) - 1  # rows before it are done; the last row predicts the answer
        begin, end = max(chunk.begin, first), min(chunk.end, sequence.prompt_length - 1)
        if begin >= end:
            return
        targets = sequence.prompt.token_ids[begin + 1 : end + 1]
        rows = np.arange(offset + begin - chunk.begin, offset + end - chunk.begin)
        result = self.runner.prompt_logprobs(hidden, rows, targets)
        request.prompt_logprobs.extend(
            self._logprobs.read(result, row, int(token), count) for row, token in enumerate(targets)
        )

    def _collect(self, moved: list[Sequence]) -> list[RequestOutput]:
        """Outputs of the requests that have a token more; of those that nobody watches, when they are finished."""
        outputs = []
        for request_id in dict.fromkeys(sequence.sequence_id.rpartition("/")[0] for sequence in moved):
            request = self._requests[request_id]
            finished = all(sequence.status is SequenceStatus.FINISHED for sequence in request.sequences)
            if finished or request.incremental:
                outputs.append(self._output(request))
            if finished:
                del self._requests[request_id]
                self.stats.finished += 1
        return outputs

    def _output(self, request: _Request) -> RequestOutput:
        return request_output(request.request_id, request.prompt, request.sequences, request.prompt_logprobs)

    def _finish(self, sequence: Sequence, reason: str, stop_reason: str | int | None = None) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.scheduler.finish(sequence)

    # Checks and sizes.

    def _prefill_tokens(self, media_budget: int) -> int:
        asked = self.engine_config.max_num_batched_tokens
        if asked is not None:
            return asked
        least = DEFAULT_PREFILL_TOKENS
        for spec in model_class(self.model_config).mask_specs(self.model_config.hf_config).values():
            if spec.prefix:  # the prompt is computed in one step
                least = self.model_config.context_length
            elif spec.bidirectional:  # and so are items that touch
                least = max(least, media_budget)
        whole = min(least, self.model_config.context_length)
        return -(-whole // TILE_SIZE) * TILE_SIZE


def _ends_by_length(params: SamplingParams) -> bool:
    """Whether a request is greedy and nothing but its length ends it: several tokens may come at once."""
    return is_plain_greedy(params) and params.ignore_eos and not params.stop and not params.stop_token_ids


def _seed(asked: int | None, base: int, number: int, index: int) -> int:
    """32 bits for answer ``index`` of request ``number``; the first answer's own where one is asked for."""
    if asked is not None and index == 0:
        return asked
    parts = [base, number, index] if asked is None else [asked, index]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
