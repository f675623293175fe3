"""The engine: requests in, steps, answers out.

add_request   tokenize, process, map, check; one sequence per answer is queued
step          schedule, encode and run on the device, take in the sampled tokens
abort_request
"""

import dataclasses

import numpy as np

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.engine.admission import Prompt, PromptPreparer
from aphrodite_jax.engine.block_manager import BlockManager
from aphrodite_jax.engine.detokenizer import Detokenizer
from aphrodite_jax.engine.encoder_cache import EncoderCache
from aphrodite_jax.engine.output import LogprobReader, request_output
from aphrodite_jax.engine.profiling import media_examples, media_tokens_per_prompt
from aphrodite_jax.engine.scheduler import Chunk, Plan, Scheduler
from aphrodite_jax.engine.sequence import PreparedPrompt, Sequence, SequenceStatus
from aphrodite_jax.errors import RequestError
from aphrodite_jax.executor.batch import Rows
from aphrodite_jax.executor.buckets import TILE_SIZE
from aphrodite_jax.executor.model_runner import ModelRunner
from aphrodite_jax.inputs import end_token_ids, load_tokenizer
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.outputs import RequestOutput
from aphrodite_jax.sampling import (
    SampledTokens,
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
        self.runner = ModelRunner(
            load_model(model_config),
            model_config,
            engine_config,
            media_budget=media_budget,
            max_num_batched_tokens=self._prefill_tokens(),
        )
        if engine_config.warm_up:
            examples = media_examples(model_config, self.runner.rows_per_item)
            self.runner.warm_up(examples, show_progress=engine_config.show_progress)
        self.scheduler = Scheduler(
            BlockManager(self.runner.num_pages, self.runner.page_size),
            EncoderCache(self.runner.encoder_rows),
            max_num_seqs=engine_config.max_num_seqs,
            token_budget=self.runner.buckets.prefill_tokens[-1],
            tile_size=TILE_SIZE,
        )
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

    def add_request(self, request_id: str, prompt: Prompt, sampling_params: SamplingParams | None = None) -> None:
        """Prepare a prompt and queue it.

        Args:
          request_id: names the request's outputs; not in use.
          prompt: text, or a dict with ``prompt`` or ``prompt_token_ids``, and ``multi_modal_data``.

        Raises:
          RequestError: this request can't be served; the engine and all others go on.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        params = sampling_params or SamplingParams()
        check_sampling_params(params, vocab_size=self.runner.vocab_size, end_token_ids=tuple(self.end_token_ids))
        number, self._num_requests = self._num_requests, self._num_requests + 1
        prepared = self._prepare(prompt)
        sequences = tuple(
            Sequence(
                f"{request_id}/{index}",
                prepared,
                params,
                seed=_seed(params.seed, self.model_config.seed, number, index),
                mask_specs=self.runner.mask_specs,
                detokenizer=Detokenizer(
                    self.tokenizer, skip_special_tokens=params.skip_special_tokens, stop=params.stop
                ),
            )
            for index in range(params.n)
        )
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._requests[request_id] = _Request(
            request_id=request_id,
            prompt=prepared,
            params=params,
            sequences=sequences,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Stop a request and free what it holds; what it has so far, or None where the id is not in use."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                self._finish(sequence, "abort")
        del self._requests[request_id]
        return self._output(request)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests)

    def reset_encoder_cache(self) -> None:
        """Forget encoded media that no running request needs; an idle engine is then as it was at the start."""
        self.scheduler.encoder_cache.discard_unpinned()

    @property
    def num_unfinished_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs of the requests that it moved on."""
        plan = self.scheduler.schedule()
        if plan is None:
            if self._requests:
                raise RuntimeError(f"a bug of the engine: nothing to schedule, yet {len(self._requests)} requests wait")
            return []
        self._encode(plan)
        logits, hidden, offsets = self.runner.forward([self._rows(chunk) for chunk in plan.chunks], decode=plan.decode)
        for chunk, offset in zip(plan.chunks, offsets, strict=True):
            self._take_prompt_logprobs(chunk, hidden, offset)
            self._advance(chunk)
        moved = [chunk.sequence for chunk in plan.chunks if chunk.samples]  # a token more, and none samples
        if moved:
            sampled = self._sample(plan, logits)
            for row, chunk in enumerate(plan.chunks):
                if chunk.samples:
                    self._take_token(chunk.sequence, sampled, row)
        return self._collect(moved)

    # A step's parts.

    def _encode(self, plan: Plan) -> None:
        """Media of one shape go together; embeddings that the user computed are stored as they are."""
        by_shape: dict[tuple, list] = {}
        for item, rows in plan.encode:
            if item.embeds is not None:
                self.runner.store(item.embeds, rows)
            elif item.mm_kwargs is not None:
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
            pages=self.scheduler.blocks.block_table(sequence.sequence_id),
            media_rows=self._media_rows(sequence, begin, end),
        )

    def _media_rows(self, sequence: Sequence, begin: int, end: int) -> np.ndarray | None:
        if not sequence.prompt.media or begin >= sequence.prompt_length:
            return None
        media_rows = np.full(end - begin, -1, np.int32)
        for item in sequence.prompt.media:
            a, b = max(begin, item.placeholder.offset), min(end, item.placeholder.stop)
            if a < b:
                rows = self.scheduler.encoder_cache.lookup(item.content_hash)
                assert rows is not None, "a running sequence's media are pinned"
                media_rows[a - begin : b - begin] = rows[a - item.placeholder.offset : b - item.placeholder.offset]
        return media_rows

    def _advance(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if sequence.prompt.media and chunk.begin < sequence.prompt_length <= chunk.end:
            self.scheduler.encoder_cache.unpin(sequence.sequence_id)

    def _sample(self, plan: Plan, logits) -> SampledTokens:
        chunks = [chunk for chunk in plan.chunks if chunk.samples]
        if all(is_plain_greedy(chunk.sequence.params) for chunk in chunks):
            return self.runner.sample(logits, None)
        rows = [self._sampling_row(chunk.sequence) for chunk in plan.chunks]
        batch = build_sampling_batch(
            rows,
            num_rows=logits.shape[0],
            vocab_size=self.runner.vocab_size,
            history_width=self.runner.context_length if any(uses_history(row.params) for row in rows) else 0,
        )
        return self.runner.sample(logits, batch)

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        return SamplingRow(
            params=sequence.params,
            seed=sequence.seed,
            prompt_token_ids=sequence.prompt.token_ids,
            output_token_ids=sequence.output_ids,
            end_token_ids=() if sequence.params.ignore_eos else tuple(self.end_token_ids),
        )

    def _take_token(self, sequence: Sequence, sampled: SampledTokens, row: int) -> None:
        token, params = int(sampled.token_ids[row]), sequence.params
        sequence.output_ids.append(token)
        if params.logprobs is not None:
            sequence.logprobs.append(self._logprobs.read(sampled, row, token, params.logprobs))
            sequence.cumulative_logprob += float(sampled.logprobs[row])
        if token in self.end_token_ids and not params.ignore_eos:
            self._finish(sequence, "stop")
        elif token in params.stop_token_ids:
            self._finish(sequence, "stop", token)
        elif (stop := sequence.detokenizer.append(token)) is not None:
            self._finish(sequence, "stop", stop)
        elif len(sequence.output_ids) >= params.max_tokens or len(sequence) >= self.runner.context_length:
            self._finish(sequence, "length")

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
        request_ids = dict.fromkeys(sequence.sequence_id.rpartition("/")[0] for sequence in moved)
        outputs = [self._output(self._requests[request_id]) for request_id in request_ids]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    def _output(self, request: _Request) -> RequestOutput:
        return request_output(request.request_id, request.prompt, request.sequences, request.prompt_logprobs)

    def _finish(self, sequence: Sequence, reason: str, stop_reason: str | int | None = None) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.scheduler.finish(sequence)

    # Checks and sizes.

    def _prefill_tokens(self) -> int:
        asked = self.engine_config.max_num_batched_tokens
        if asked is not None:
            return asked
        whole = min(DEFAULT_PREFILL_TOKENS, self.model_config.context_length)
        return -(-whole // TILE_SIZE) * TILE_SIZE


def _seed(asked: int | None, base: int, number: int, index: int) -> int:
    """32 bits for answer ``index`` of request ``number``; the first answer's own where one is asked for."""
    if asked is not None and index == 0:
        return asked
    parts = [base, number, index] if asked is None else [asked, index]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
