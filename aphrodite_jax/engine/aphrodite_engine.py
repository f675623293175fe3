"""The engine: requests in, steps, answers out.

add_request   tokenize, process, map, check; one sequence per answer is queued
step          schedule, encode, send the programs to the device; take in the tokens of the step before
abort_request

The host is one step ahead of each replica's devices (`engine.replica`). A request with penalties, whose next token
hangs on those before in the host's hands, makes the host wait instead.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.engine.admission import Prompt, PromptPreparer
from aphrodite_jax.engine.detokenizer import Detokenizer
from aphrodite_jax.engine.lockstep import Lockstep
from aphrodite_jax.engine.output import LogprobReader, request_output
from aphrodite_jax.engine.profiling import media_shapes, media_tokens_per_prompt
from aphrodite_jax.engine.replica import Replica
from aphrodite_jax.engine.scheduler import Chunk, Scheduler
from aphrodite_jax.engine.sequence import PreparedPrompt, Sequence, SequenceStatus
from aphrodite_jax.engine.stats import EngineStats, clock
from aphrodite_jax.errors import RequestError
from aphrodite_jax.executor.buckets import TILE_SIZE
from aphrodite_jax.executor.mesh import make_mesh, part_on, processes_of, replica_meshes, share_of_work
from aphrodite_jax.executor.model_runner import MAX_DECODE_STEPS, ModelRunner
from aphrodite_jax.executor.processes import coordinator
from aphrodite_jax.inputs import end_token_ids, load_tokenizer
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.outputs import RequestOutput
from aphrodite_jax.sampling import (
    SampledTokens,
    check_sampling_params,
    is_plain_greedy,
)
from aphrodite_jax.sampling_params import SamplingParams

__all__ = ["AphroditeEngine"]

DEFAULT_PREFILL_TOKENS = 2048


@dataclasses.dataclass(kw_only=True)
class _Request:
    """A request that runs: its sequences, and the log-probabilities of its prompt so far."""

    request_id: str
    replica: Replica
    prompt: PreparedPrompt
    params: SamplingParams
    sequences: tuple[Sequence, ...]
    prompt_logprobs: list | None = None
    incremental: bool = True
    arrived: float = 0.0
    last_token: float | None = None  # when it came, of any of the sequences


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
        self.stats = EngineStats()
        self._mesh = make_mesh(engine_config.tensor_parallel_size, engine_config.data_parallel_size)
        self.replicas = self._make_replicas(media_budget)
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

    @property
    def runner(self) -> ModelRunner:
        """The model on the devices of the first replica; the others' differ in nothing but devices."""
        return self.replicas[0].runner

    @property
    def scheduler(self) -> Scheduler:
        """The first replica's."""
        return self.replicas[0].scheduler

    @property
    def max_running(self) -> int:
        """Sequences that all replicas run at a time."""
        return self.engine_config.max_num_seqs * len(self.replicas)

    @property
    def lockstep(self) -> Lockstep | None:
        """What holds this process together with others that serve the same replica; None for one that is alone."""
        return self.replicas[0].lockstep

    @property
    def share_of_work(self) -> tuple[int, int]:
        """Which share of a job that runs in several processes this one does, and of how many."""
        return share_of_work(self._mesh)

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
          sampling_params: None is ``SamplingParams()``, which samples at temperature 1; `LLM` is greedy without any.
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
        replica = self.replica_for(prepared)
        for sequence in sequences:
            replica.scheduler.add(sequence)
        self._requests[request_id] = _Request(
            request_id=request_id,
            replica=replica,
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

    def replica_for(self, prepared: PreparedPrompt) -> Replica:
        """Where a request would go now: to the replica with the fewest, and among equals to one that has its media."""
        return min(self.replicas, key=lambda replica: (replica.num_unfinished, not replica.holds(prepared)))

    def preview(self, prepared: PreparedPrompt) -> list[tuple[int, int]]:
        """The chunks ``[begin, end)`` in which a prompt would be computed now if it came alone; changes nothing.

        The first begins behind the pages that hold the prompt's first tokens already.

        Raises:
          RequestError: rows that see each other don't fit in one step.
        """
        sequence = self._sequence("preview", prepared, SamplingParams(), (0, 0))
        return self.replica_for(prepared).scheduler.preview(sequence)

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

    def has_request(self, request_id: str) -> bool:
        """Whether a request of this id waits or runs."""
        return request_id in self._requests

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests)

    def describe_stats(self) -> dict[str, Any]:
        """`EngineStats` as plain values, and how the caches are doing now."""
        schedulers = [replica.scheduler for replica in self.replicas]
        return self.stats.as_dict(
            {
                "prompt_tokens_cached": sum(x.num_cached_tokens for x in schedulers),
                "preemptions": sum(x.num_preemptions for x in schedulers),
                "replicas": len(self.replicas),
                "pages": sum(x.blocks.num_pages for x in schedulers),
                "pages_in_use": sum(x.blocks.num_pages - x.blocks.num_free_pages for x in schedulers),
                "programs": sum(len(replica.runner.programs.table()) for replica in self.replicas),
                "late_compiles": sum(replica.runner.programs.late_compiles for replica in self.replicas),
            }
        )

    def reset_caches(self) -> None:
        """Forget encoded media and pages that no running request needs; an idle engine is then as at the start."""
        for replica in self.replicas:
            replica.reset_caches()

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
        busy = [replica for replica in self.replicas if replica.num_unfinished or replica.num_sent]
        # Those whose devices are done go on; nobody waits for one while another has nothing to do.
        for replica in [x for x in busy if x.is_ready] or busy[:1]:
            moved += self._advance(replica, max_decode_steps)
        outputs = self._collect(moved)
        took = clock() - begin
        self.stats.step += took
        self.stats.plan += took - (self.stats.wait - waited)
        return outputs

    def _advance(self, replica: Replica, max_decode_steps: int) -> list[Sequence]:
        """Send a replica's next step and take in the one before; the sequences that have one more token."""
        moved = self._take_in(replica) if replica.num_sent and replica.needs_history else []
        with jax.profiler.TraceAnnotation("plan and send"):
            step = replica.send(max_decode_steps)
        if step is None and not replica.num_sent and not moved and replica.num_unfinished:
            raise RuntimeError(f"no step can be planned, though {replica.num_unfinished} sequences wait")
        if step is not None and step.offsets is not None:
            for chunk, offset in zip(step.plan.prefill, step.offsets, strict=True):
                self._take_prompt_logprobs(replica, chunk, step.hidden, offset)
            step.hidden = None
        while replica.num_sent > (step is not None):
            moved += self._take_in(replica)
        return moved

    def _take_in(self, replica: Replica) -> list[Sequence]:
        """Wait for a replica's oldest step and take its tokens; the sequences that have one more."""
        step, tokens = replica.take_in()
        moved = []
        for index in range(step.plan.num_steps):
            for row, chunk in enumerate(step.plan.chunks):
                if chunk.samples:
                    chunk.sequence.num_pending -= 1
                    if chunk.sequence.status is not SequenceStatus.FINISHED:
                        self._take_token(chunk.sequence, int(tokens[index, row]), step.details, row)
                        moved.append(chunk.sequence)
        for sequence in moved:
            replica.scheduler.publish(sequence)
        return moved

    def _take_token(self, sequence: Sequence, token: int, sampled: SampledTokens | None, row: int) -> None:
        params = sequence.params
        sequence.output_ids.append(token)
        self._count_token(self._request_of(sequence))
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

    def _take_prompt_logprobs(self, replica: Replica, chunk: Chunk, hidden, offset: int) -> None:
        sequence = chunk.sequence
        request = self._request_of(sequence)
        count = request.params.prompt_logprobs
        if count is None or request.prompt_logprobs is None or sequence is not request.sequences[0]:
            return
        first = len(request.prompt_logprobs) - 1  # rows before it are done; the last row predicts the answer
        begin, end = max(chunk.begin, first), min(chunk.end, sequence.prompt_length - 1)
        if begin >= end:
            return
        targets = sequence.prompt.token_ids[begin + 1 : end + 1]
        rows = np.arange(offset + begin - chunk.begin, offset + end - chunk.begin)
        result = replica.runner.prompt_logprobs(hidden, rows, targets)
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
        self._request_of(sequence).replica.scheduler.finish(sequence)

    def _request_of(self, sequence: Sequence) -> _Request:
        return self._requests[sequence.sequence_id.rpartition("/")[0]]

    # The model, checks and sizes.

    def _make_replicas(self, media_budget: int) -> tuple[Replica, ...]:
        """The model on each row of the mesh that this process serves, its programs compiled if they are to be."""
        config = self.engine_config
        model = load_model(self.model_config, self._mesh, config.encoder_parallel)
        replicas = []
        for row in replica_meshes(self._mesh):
            runner = ModelRunner(
                part_on(model, row),
                self.model_config,
                config,
                media_budget=media_budget,
                max_num_batched_tokens=self._prefill_tokens(media_budget),
                media_shapes=functools.partial(media_shapes, self.model_config),
                mesh=row,
            )
            lockstep = self._make_lockstep(row, runner)
            if config.warm_up:
                runner.warm_up(show_progress=config.show_progress)
            replicas.append(
                Replica(
                    runner,
                    self.stats,
                    end_token_ids=self.end_token_ids,
                    max_num_seqs=config.max_num_seqs,
                    prefix_caching=config.prefix_caching,
                    lockstep=lockstep,
                )
            )
        return tuple(replicas)

    def _make_lockstep(self, row: Mesh | None, runner: ModelRunner) -> Lockstep | None:
        """For a replica that several processes serve; they must agree on all that their programs are made of."""
        processes = processes_of(row)
        if row is None or len(processes) == 1:
            return None
        name = f"replica {processes[0]}"
        lockstep = Lockstep(coordinator(), name, processes=processes, process=jax.process_index())
        lockstep.compare("jax's version", jax.__version__)
        lockstep.compare("the model's config", str(self.model_config.hf_config.to_dict()))
        told_of_engine = dataclasses.replace(self.engine_config, trace_dir=None, compilation_cache_dir=None)
        lockstep.compare("the engine's options", str(told_of_engine))
        lockstep.compare("the number of KV pages", str(runner.num_pages))
        return lockstep

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
