"""Which rows the next step computes: continuous batching over pages, with preemption when they run out.

A step takes one row of every sequence that generates, and beside them chunks of prompts within the token budget, in
one ragged batch. A chunk ends only where no row behind it sees past its end (`kernels_pallas.intervals.ends_cleanly`).
A prompt begins behind the pages that stand there already (`engine.page_keys`). When a generating sequence needs a page
and nobody can spare one, the sequence that came last gives up its pages and is computed again later.

The host plans while the device runs: a plan counts on tokens that are still pending.
"""

import dataclasses
from collections import deque

import numpy as np

from aphrodite_jax.engine.block_manager import BlockManager
from aphrodite_jax.engine.encoder_cache import EncoderCache
from aphrodite_jax.engine.page_keys import page_keys, reusable_pages
from aphrodite_jax.engine.sequence import MediaItem, Sequence, SequenceStatus
from aphrodite_jax.errors import RequestError

__all__ = ["Chunk", "Plan", "Scheduler"]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens ``[begin, end)`` of a sequence; its last row is sampled where that is the sequence's last token."""

    sequence: Sequence
    begin: int
    end: int
    samples: bool

    def __len__(self) -> int:
        return self.end - self.begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One step.

    Attributes:
      decode: chunks of one row, which come first in the batch.
      prefill: the others.
      encode: media to encode into their rows of the encoder cache before.
      num_steps: more than 1 where all of ``decode`` generates so many tokens in one program, and there is no prefill.
    """

    decode: tuple[Chunk, ...]
    prefill: tuple[Chunk, ...] = ()
    encode: tuple[tuple[MediaItem, np.ndarray], ...] = ()
    num_steps: int = 1

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All, in the batch's order."""
        return self.decode + self.prefill


class Scheduler:
    """Keeps the waiting and the running sequences, and the pages and encoder rows they hold.

    Args:
      max_num_seqs: sequences that run at once.
      token_budget: rows of prompts in a step; each chunk takes whole tiles of ``tile_size`` rows of it.
      prefix_caching: whether prompts begin behind pages that other sequences have computed.
    """

    def __init__(
        self,
        blocks: BlockManager,
        encoder_cache: EncoderCache,
        *,
        max_num_seqs: int,
        token_budget: int,
        tile_size: int,
        prefix_caching: bool = True,
    ):
        self.blocks = blocks
        self.encoder_cache = encoder_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._max_num_seqs = max_num_seqs
        self._token_budget = token_budget
        self._tile_size = tile_size
        self._prefix_caching = prefix_caching
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
          RequestError: one of its chunks could not fit in a step.
        """
        self._check(sequence)
        self.waiting.append(sequence)

    def preview(self, sequence: Sequence) -> list[tuple[int, int]]:
        """The chunks ``[begin, end)`` in which the sequence would be prefilled now if it were alone; changes nothing.

        The first begins behind the pages that stand there already.

        Raises:
          RequestError: as `add`.
        """
        self._check(sequence)
        chunks, begin = [], len(self._shared_keys(sequence)) * self.blocks.page_size
        while begin < len(sequence):
            end = self._chunk_end(sequence, begin, self._token_budget)
            chunks.append((begin, end))
            begin = end
        return chunks

    def _check(self, sequence: Sequence) -> None:
        need = _longest_chunk(sequence)
        if -(-need // self._tile_size) * self._tile_size > self._token_budget:
            raise RequestError(
                f"{need} rows of the prompt see each other and must be computed in one step; max_num_batched_tokens "
                f"allows {self._token_budget}: raise it"
            )

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self, max_decode_steps: int = 1) -> Plan | None:
        """The next step, or None when there is nothing to do.

        Args:
          max_decode_steps: tokens of each sequence in one program at most; what is added meanwhile waits for its end.
        """
        decode = self._decode()
        prefill, encode = self._prefill()
        # A prompt's last row, say. Rows that are asked for log-probabilities stand among the others.
        short = tuple(chunk for chunk in prefill if len(chunk) == 1 and chunk.sequence.params.prompt_logprobs is None)
        plan = Plan(
            decode=decode + short,
            prefill=tuple(chunk for chunk in prefill if chunk not in short),
            encode=tuple(encode),
            num_steps=1 if prefill else self._num_steps(decode, max_decode_steps),
        )
        return plan if plan.chunks else None

    def sent(self, plan: Plan) -> None:
        """The plan's rows are on their way: later plans count on them."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end + plan.num_steps - 1
            sequence.num_pending += plan.num_steps * chunk.samples
            sequence.latest_is_in_slot = chunk.samples
            if sequence.prompt.media and chunk.begin < sequence.prompt_length <= chunk.end:
                self.encoder_cache.unpin(sequence.sequence_id)
            self.publish(sequence)

    def revoke(self, plan: Plan) -> None:
        """The plan could not be sent, or nobody knows how far: its sequences begin anew, its media are not encoded."""
        for chunk in reversed(plan.chunks):
            if chunk.sequence.status is SequenceStatus.RUNNING:
                self._preempt(chunk.sequence)
        for item, _ in plan.encode:
            self.encoder_cache.discard(item.content_hash)

    def publish(self, sequence: Sequence) -> None:
        """Let others share the sequence's pages that are full of tokens that are computed and known."""
        if not self._prefix_caching or sequence.status is not SequenceStatus.RUNNING:
            return
        size = self.blocks.page_size
        full = min(sequence.num_computed, sequence.num_known) // size
        if full > sequence.num_published:
            keys = page_keys(sequence, size, full * size)
            for index in range(sequence.num_published, full):
                self.blocks.publish(sequence.sequence_id, index, keys[index])
            sequence.num_published = full

    def _decode(self) -> tuple[Chunk, ...]:
        """One row of each sequence whose other rows are computed."""
        chunks = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for the sake of one before it
            if len(sequence) - sequence.num_computed != 1 or not sequence.may_grow:
                continue
            if sequence.num_computed < sequence.prompt_length:
                continue  # the last row of a prompt
            while not self.blocks.can_allocate(sequence.sequence_id, len(sequence)):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self.blocks.grow(sequence.sequence_id, len(sequence))
                chunks.append(Chunk(sequence, sequence.num_computed, len(sequence), True))
        return tuple(chunk for chunk in chunks if chunk.sequence.status is SequenceStatus.RUNNING)

    def _prefill(self) -> tuple[list[Chunk], list[tuple[MediaItem, np.ndarray]]]:
        chunks: list[Chunk] = []
        encode: list[tuple[MediaItem, np.ndarray]] = []
        budget = self._token_budget
        for sequence in self.running:
            if sequence.num_computed < max(sequence.prompt_length, len(sequence) - 1):
                budget = self._take_chunk(sequence, budget, chunks)
        while self.waiting and budget >= self._tile_size and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            if sequence.num_pending:
                break  # preempted, and a token of it is on its way
            keys = self._shared_keys(sequence)
            headroom = len(self.running) * self.blocks.page_size  # or it would soon be preempted again
            if not self.blocks.can_share(keys, len(sequence) + headroom):
                break
            sequence.num_computed = len(keys) * self.blocks.page_size
            left = self._take_chunk(sequence, budget, chunks)
            placed = None if left == budget else self._place_media(sequence)
            if placed is None:  # not even its first chunk fits in what is left of this step, or its media don't
                if left < budget:
                    chunks.pop()
                sequence.num_computed = 0
                break
            budget = left
            encode.extend(placed)
            self.blocks.share(sequence.sequence_id, keys)
            self.blocks.grow(sequence.sequence_id, len(sequence))
            self.num_cached_tokens += sequence.num_computed
            sequence.num_cached = sequence.num_computed
            sequence.num_published = len(keys)
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.slot = self._free_slots.pop()
            sequence.status = SequenceStatus.RUNNING
        return chunks, encode

    def _shared_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that a waiting sequence can begin behind."""
        if not self._prefix_caching or sequence.params.prompt_logprobs is not None:  # which want every row
            return []
        size = self.blocks.page_size
        keys = page_keys(sequence, size, len(sequence) - 1)
        return keys[: reusable_pages(sequence.prompt, size, self.blocks.known(keys))]

    def _take_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the longest chunk that fits; returns the budget that is left."""
        begin = sequence.num_computed
        end = self._chunk_end(sequence, begin, budget)
        if end == begin:
            return budget
        chunks.append(Chunk(sequence, begin, end, end == len(sequence)))
        return budget - -(-(end - begin) // self._tile_size) * self._tile_size

    def _chunk_end(self, sequence: Sequence, begin: int, budget: int) -> int:
        """Where the longest chunk from ``begin`` on ends that fits in the budget; ``begin`` where none does."""
        room = budget // self._tile_size * self._tile_size
        end = min(len(sequence), begin + room)
        if begin < end < sequence.prompt_length:
            ends = begin + 1 + np.flatnonzero(sequence.prompt.may_end[begin:end])
            end = int(ends[-1]) if len(ends) else begin
        return end

    def _place_media(self, sequence: Sequence) -> list[tuple[MediaItem, np.ndarray]] | None:
        """Pin the media of rows to compute in the encoder cache; what must be encoded, or None if there is no room."""
        missing = []
        for item in sequence.prompt.media:
            if item.placeholder.stop <= sequence.num_computed:
                continue
            if self.encoder_cache.lookup(item.content_hash) is None:
                rows = self.encoder_cache.allocate(item.content_hash, item.placeholder.num_rows)
                if rows is None:
                    self.encoder_cache.unpin(sequence.sequence_id)
                    for other, _ in missing:
                        self.encoder_cache.discard(other.content_hash)
                    return None
                missing.append((item, rows))
            self.encoder_cache.pin(item.content_hash, sequence.sequence_id)
        return missing

    def _num_steps(self, decode: tuple[Chunk, ...], steps: int) -> int:
        """Tokens, at most ``steps``, that all of ``decode`` may generate in one program.

        None of them can finish before, or need a page of others.

        Called where no prompt is computed, so that none can join before one of these finishes.
        """
        for chunk in decode:
            sequence = chunk.sequence
            if not (sequence.ends_by_length and sequence.latest_is_in_slot):
                return 1
            steps = min(steps, sequence.max_length - len(sequence))
        while (
            steps > 1
            and sum(
                self.blocks.missing(chunk.sequence.sequence_id, len(chunk.sequence) + steps - 1) for chunk in decode
            )
            > self.blocks.num_free_pages
        ):
            steps -= 1
        for chunk in decode if steps > 1 else ():
            self.blocks.grow(chunk.sequence.sequence_id, len(chunk.sequence) + steps - 1)
        return max(steps, 1)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.sequence_id)
        self.encoder_cache.unpin(sequence.sequence_id)
        sequence.num_published = 0
        sequence.latest_is_in_slot = False
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1


def _longest_chunk(sequence: Sequence) -> int:
    """Rows of the longest run of the prompt that can't be cut."""
    ends = np.flatnonzero(np.append(sequence.prompt.may_end[:-1], True)) + 1
    return int(np.diff(ends, prepend=0).max())
