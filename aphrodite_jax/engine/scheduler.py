"""Which rows the next step computes: continuous batching over pages, with preemption when they run out.

Prefill goes first: a step either takes chunks of prompts, within the token budget, or one row of every running
sequence. A chunk ends only where no row behind it sees past its end (`kernels_pallas.intervals.ends_cleanly`).
When a running sequence needs a page and none is free, the sequence that came last gives up its pages and is
computed again later.
"""

import dataclasses
from collections import deque

import numpy as np

from aphrodite_jax.engine.block_manager import BlockManager
from aphrodite_jax.engine.encoder_cache import EncoderCache
from aphrodite_jax.engine.sequence import MediaItem, Sequence, SequenceStatus
from aphrodite_jax.errors import RequestError

__all__ = ["Chunk", "Plan", "Scheduler"]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens ``[begin, end)`` of a sequence; its last row is sampled where that is the sequence's last token."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the next token is chosen after this chunk."""
        return self.end == len(self.sequence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One step: the chunks to compute, and media to encode into their rows of the encoder cache before."""

    decode: bool
    chunks: tuple[Chunk, ...]
    encode: tuple[tuple[MediaItem, np.ndarray], ...] = ()


class Scheduler:
    """Keeps the waiting and the running sequences, and the pages and encoder rows they hold.

    Args:
      max_num_seqs: sequences that run at once.
      token_budget: rows of a prefill step; each chunk takes whole tiles of ``tile_size`` rows of it.
    """

    def __init__(
        self,
        blocks: BlockManager,
        encoder_cache: EncoderCache,
        *,
        max_num_seqs: int,
        token_budget: int,
        tile_size: int,
    ):
        self.blocks = blocks
        self.encoder_cache = encoder_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._token_budget = token_budget
        self._tile_size = tile_size

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
          RequestError: one of its chunks could not fit in a step.
        """
        need = _longest_chunk(sequence)
        if -(-need // self._tile_size) * self._tile_size > self._token_budget:
            raise RequestError(
                f"{need} rows of the prompt see each other and must be computed in one step; max_num_batched_tokens "
                f"allows {self._token_budget}: raise it"
            )
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> Plan | None:
        """The next step, or None when there is nothing to do."""
        return self._prefill() or self._decode()

    def _prefill(self) -> Plan | None:
        chunks: list[Chunk] = []
        encode: list[tuple[MediaItem, np.ndarray]] = []
        budget = self._token_budget
        for sequence in self.running:
            if sequence.num_computed < len(sequence) - 1 or not sequence.output_ids:
                budget = self._take_chunk(sequence, budget, chunks)
        while self.waiting and budget >= self._tile_size and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            headroom = len(self.running) * self.blocks.page_size  # or it would soon be preempted again
            if not self.blocks.can_allocate(sequence.sequence_id, len(sequence) + headroom):
                break
            left = self._take_chunk(sequence, budget, chunks)
            if left == budget:  # not even its first chunk fits in what is left of this step
                break
            placed = self._place_media(sequence)
            if placed is None:
                chunks.pop()
                break
            budget = left
            encode.extend(placed)
            self.blocks.grow(sequence.sequence_id, len(sequence))
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
        return Plan(decode=False, chunks=tuple(chunks), encode=tuple(encode)) if chunks else None

    def _take_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the longest chunk that fits; returns the budget that is left."""
        room = budget // self._tile_size * self._tile_size
        begin = sequence.num_computed
        end = min(len(sequence), begin + room)
        if begin < end < sequence.prompt_length:
            ends = begin + 1 + np.flatnonzero(sequence.prompt.may_end[begin:end])
            end = int(ends[-1]) if len(ends) else begin
        if end == begin:
            return budget
        chunks.append(Chunk(sequence, begin, end))
        return budget - -(-(end - begin) // self._tile_size) * self._tile_size

    def _place_media(self, sequence: Sequence) -> list[tuple[MediaItem, np.ndarray]] | None:
        """Pin the sequence's media in the encoder cache; what must be encoded, or None if there is no room."""
        missing = []
        for item in sequence.prompt.media:
            if self.encoder_cache.lookup(item.content_hash) is None:
                rows = self.encoder_cache.allocate(item.content_hash, item.placeholder.length)
                if rows is None:
                    self.encoder_cache.unpin(sequence.sequence_id)
                    for other, _ in missing:
                        self.encoder_cache.discard(other.content_hash)
                    return None
                missing.append((item, rows))
            self.encoder_cache.pin(item.content_hash, sequence.sequence_id)
        return missing

    def _decode(self) -> Plan | None:
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for the sake of one before it
            while not self.blocks.can_allocate(sequence.sequence_id, len(sequence)):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self.blocks.grow(sequence.sequence_id, len(sequence))
        chunks = tuple(Chunk(sequence, sequence.num_computed, len(sequence)) for sequence in self.running)
        return Plan(decode=True, chunks=chunks) if chunks else None

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


def _longest_chunk(sequence: Sequence) -> int:
    """Rows of the longest run of the prompt that can't be cut."""
    ends = np.flatnonzero(np.append(sequence.prompt.may_end[:-1], True)) + 1
    return int(np.diff(ends, prepend=0).max())
