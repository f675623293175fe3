"""One copy of the model: its scheduler, its caches, and the steps that its devices have still to do.

The host is one step ahead: while the devices run a step, the next is planned and sent, and what the devices chose comes
back one step late. A sequence that turns out to have ended has a row too many in the step behind, which is dropped.
"""

import collections
import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from aphrodite_jax.engine.block_manager import BlockManager
from aphrodite_jax.engine.encoder_cache import EncoderCache
from aphrodite_jax.engine.lockstep import Lockstep
from aphrodite_jax.engine.scheduler import Chunk, Plan, Scheduler
from aphrodite_jax.engine.sequence import PreparedPrompt, Sequence, num_values
from aphrodite_jax.engine.stats import EngineStats, clock
from aphrodite_jax.executor.batch import Rows
from aphrodite_jax.executor.buckets import TILE_SIZE
from aphrodite_jax.executor.model_runner import ModelRunner
from aphrodite_jax.sampling import (
    SampledTokens,
    SamplingBatch,
    SamplingRow,
    build_sampling_batch,
    is_plain_greedy,
    uses_history,
)

__all__ = ["Replica", "Step"]


@dataclasses.dataclass(kw_only=True)
class Step:
    """A step on the devices.

    Attributes:
      plan: what it computes.
      tokens: to come, ``[steps, R]`` or ``[R]``; None where no row of it is sampled.
      details: what else is told of them.
      hidden: hidden states ``[T, D]`` of the rows of ``plan.prefill``.
      offsets: where the rows of each chunk of ``plan.prefill`` begin among these.
    """

    plan: Plan
    tokens: Any = None
    details: SampledTokens | None = None
    hidden: jax.Array | None = None
    offsets: np.ndarray | None = None


class Replica:
    """Plans steps, sends them to the devices, and waits for what they chose.

    Args:
      runner: the model on its devices.
      stats: counted up.
      end_token_ids: those that end an answer.
      max_num_seqs, prefix_caching: as `Scheduler`.
      lockstep: compares the schedule with that of other processes that have a part in the same devices.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stats: EngineStats,
        *,
        end_token_ids: Collection[int],
        max_num_seqs: int,
        prefix_caching: bool,
        lockstep: Lockstep | None = None,
    ):
        self.runner = runner
        self.scheduler = Scheduler(
            BlockManager(runner.num_pages, runner.page_size),
            EncoderCache(runner.encoder_rows),
            max_num_seqs=max_num_seqs,
            token_budget=runner.buckets.prefill_tokens[-1],
            tile_size=TILE_SIZE,
            prefix_caching=prefix_caching,
        )
        self.lockstep = lockstep
        self._stats = stats
        self._end_token_ids = tuple(end_token_ids)
        self._sent: collections.deque[Step] = collections.deque()

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    @property
    def num_sent(self) -> int:
        """Steps that were sent and not taken in."""
        return len(self._sent)

    @property
    def is_ready(self) -> bool:
        """Whether taking in the oldest step would not have to wait."""
        return not self._sent or self._sent[0].tokens is None or self._sent[0].tokens.is_ready()

    @property
    def needs_history(self) -> bool:
        """Whether the next token of a sequence hangs on all before it, in the host's hands."""
        return any(uses_history(sequence.params) for sequence in self.scheduler.running)

    def holds(self, prompt: PreparedPrompt) -> bool:
        """Whether a media item of the prompt is encoded here already."""
        return any(self.scheduler.encoder_cache.lookup(item.content_hash) is not None for item in prompt.media)

    def reset_caches(self) -> None:
        """Forget encoded media and pages that no running sequence needs."""
        self.scheduler.encoder_cache.discard_unpinned()
        self.scheduler.blocks.forget_idle()

    def send(self, max_decode_steps: int) -> Step | None:
        """Plan a step and start its programs; None where there is nothing to do.

        Raises:
          LockstepError: another process planned another step.
        """
        plan = self.scheduler.schedule(max_decode_steps)
        if plan is None:
            return None
        try:
            if self.lockstep is not None:
                self.lockstep.agree(plan)
            step = self._start(plan)
        except BaseException:  # an interrupt too: whoever goes on must not count on what was planned
            self.scheduler.revoke(plan)
            raise
        self.scheduler.sent(plan)
        self._sent.append(step)
        return step

    def take_in(self) -> tuple[Step, np.ndarray]:
        """Wait for the oldest step; it, and its tokens ``[steps, R]`` (of a step without any, one that is None)."""
        step = self._sent[0]
        begin = clock()
        with jax.profiler.TraceAnnotation("wait"):
            tokens, step.details = jax.device_get((step.tokens, step.details))
        self._sent.popleft()  # no sooner: who interrupts the wait may go on with it
        self._stats.wait += clock() - begin
        return step, np.atleast_2d(tokens)

    # A step's parts.

    def _start(self, plan: Plan) -> Step:
        self._encode(plan)
        plain = all(is_plain_greedy(chunk.sequence.params) for chunk in plan.chunks if chunk.samples)
        if plain and not plan.prefill and all(chunk.sequence.latest_is_in_slot for chunk in plan.decode):
            sequences = [chunk.sequence for chunk in plan.decode]
            tokens = self.runner.decode(
                [sequence.slot for sequence in sequences],
                [chunk.begin for chunk in plan.decode],
                [sequence.prompt.position_offset for sequence in sequences],
                [self.scheduler.blocks.block_table(sequence.sequence_id) for sequence in sequences],
                plan.num_steps,
            )
            self._count(plan, self.runner.num_greedy_rows(len(sequences)) * plan.num_steps)
            return Step(plan=plan, tokens=tokens)
        decode, prefill = ([self._rows(chunk) for chunk in chunks] for chunks in (plan.decode, plan.prefill))
        logits, hidden, offsets = self.runner.forward(decode, prefill)
        self._count(plan, self.runner.num_rows(decode, prefill))
        step = Step(plan=plan, hidden=hidden, offsets=offsets)
        if any(chunk.samples for chunk in plan.chunks):
            slots = np.full(logits.shape[0], self.runner.num_slots, np.int32)
            for row, chunk in enumerate(plan.chunks):
                if chunk.samples:
                    slots[row] = chunk.sequence.slot
            batch = None if plain else self._sampling_batch(plan, logits.shape[0])
            step.tokens, step.details = self.runner.sample(logits, slots, batch)
        return step

    def _count(self, plan: Plan, num_rows: int) -> None:
        """``num_rows`` are those that the devices compute, padding included."""
        stats = self._stats
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
                self._stats.media_values += item.num_values
                self._stats.media_padding += num_values(item.mm_kwargs) - item.num_values
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
            end_token_ids=() if sequence.params.ignore_eos else self._end_token_ids,
        )
