"""A request on the host: its prepared prompt, and one sequence of tokens per answer."""

import dataclasses
import enum
import functools
from collections.abc import Mapping

import numpy as np

from aphrodite_jax.engine.detokenizer import Detokenizer
from aphrodite_jax.inputs import PlaceholderRange
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.outputs import Logprob, MediaInfo
from aphrodite_jax.sampling_params import SamplingParams
from kernels_pallas.intervals import RowIntervals, causal, ends_cleanly

__all__ = ["MediaItem", "PreparedPrompt", "Sequence", "SequenceStatus", "num_values"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaItem:
    """One item of a prompt: its content hash, its place, and its arrays (items axis of 1) or embeddings.

    The arrays are those of the mapper as the model's ``pad_media`` made them; rows past the placeholder's are padding.
    ``num_values`` are the numbers in its pixels before; ``info`` is what the request's output tells of it.
    """

    modality: str
    content_hash: str
    placeholder: PlaceholderRange
    info: MediaInfo
    mm_kwargs: Mapping[str, np.ndarray] | None = None
    num_values: int = 0
    embeds: np.ndarray | None = None  # [rows, D]


def num_values(mm_kwargs: Mapping[str, np.ndarray]) -> int:
    """Numbers in the floating-point arrays of an item: its pixels, and not what tells where they stand."""
    return sum(array.size for array in mm_kwargs.values() if array.dtype.kind == "f")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """A checked prompt: expanded token ids, row intervals by mask kind, media in the order of their places.

    ``positions`` ``[axes, T]`` are those of a model with several axes of them; None where rows are numbered through.
    ``key_salt`` is what else decides keys and values of the prompt's rows (`engine.page_keys`): where angles depend on
    the prompt's length, that.
    """

    text: str | None
    token_ids: np.ndarray
    intervals: Mapping[str, RowIntervals]
    media: tuple[MediaItem, ...] = ()
    positions: np.ndarray | None = None
    key_salt: bytes = b""

    @functools.cached_property
    def token_tuple(self) -> tuple[int, ...]:
        """``token_ids`` as plain numbers."""
        return tuple(self.token_ids.tolist())

    @functools.cached_property
    def position_offset(self) -> int:
        """What the position of a token of the answer has over its place among all tokens."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - len(self.token_ids)

    @functools.cached_property
    def may_end(self) -> np.ndarray:
        """Whether a chunk may end after each token ``[T]``: no row before sees past it, under any mask kind."""
        return np.logical_and.reduce([ends_cleanly(rows.stop) for rows in self.intervals.values()])

    def positions_of(self, begin: int, end: int) -> np.ndarray | None:
        """Positions ``[axes, end - begin]`` of the tokens ``[begin, end)`` of prompt and answer.

        None where rows are numbered through.
        """
        if self.positions is None:
            return None
        split = min(max(begin, len(self.token_ids)), end)
        answer = np.arange(split, end, dtype=np.int32) + np.int32(self.position_offset)
        prompt = self.positions[:, begin:split]
        return np.concatenate([prompt, np.broadcast_to(answer, (len(prompt), end - split))], axis=1)

    def intervals_of(self, mask_specs: Mapping[str, MaskSpec], begin: int, end: int) -> dict[str, RowIntervals]:
        """Row intervals of the tokens ``[begin, end)`` of prompt and answer: the prompt's own, then causal ones."""
        split = min(max(begin, len(self.token_ids)), end)
        result = {}
        for kind, spec in mask_specs.items():
            prompt = self.intervals[kind]
            answer = causal(end - split, offset=split, window=spec.window)
            result[kind] = RowIntervals(
                np.concatenate([prompt.start[begin:split], answer.start]),
                np.concatenate([prompt.stop[begin:split], answer.stop]),
            )
        return result


class SequenceStatus(enum.Enum):
    """Where a sequence is on its way."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """The tokens of one answer and how far the caches are with them.

    The device runs ahead of the host: a token that is chosen there and not known here yet is *pending*, and counts in
    the sequence's length.

    Attributes:
      num_computed: tokens whose keys and values stand in pages, or will once the device has run what was sent to it;
        it falls to 0 when the sequence is preempted, and everything before is computed again.
      num_pending: tokens chosen on the device that have not come back.
      slot: place of the sequence in the device's array of latest tokens, while it runs.
      latest_is_in_slot: whether its latest token is there; not where the slot is new and a token was known before.
      page_keys: of its first pages, as far as they were asked for (`engine.page_keys`); others know the first
        ``num_published`` of them.
      num_cached: tokens at its beginning that were there when it began to run.
      max_length: tokens of prompt and answer at most.
      ends_by_length: whether nothing else ends it, and its next token hangs on its tokens alone.
    """

    def __init__(
        self,
        sequence_id: str,
        prompt: PreparedPrompt,
        params: SamplingParams,
        *,
        seed: int,
        mask_specs: Mapping[str, MaskSpec],
        detokenizer: Detokenizer,
        max_length: int,
        ends_by_length: bool = False,
    ):
        self.sequence_id = sequence_id
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.detokenizer = detokenizer
        self.max_length = max_length
        self.ends_by_length = ends_by_length
        self.status = SequenceStatus.WAITING
        self.output_ids: list[int] = []
        self.num_computed = 0
        self.num_pending = 0
        self.num_preemptions = 0
        self.slot = -1
        self.latest_is_in_slot = False
        self.page_keys: list[bytes] = []
        self.num_published = 0
        self.num_cached = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self._mask_specs = mask_specs

    def __len__(self) -> int:
        return self.num_known + self.num_pending

    @property
    def num_known(self) -> int:
        """Tokens of prompt and answer that the host knows."""
        return len(self.prompt.token_ids) + len(self.output_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids)

    @property
    def may_grow(self) -> bool:
        """Whether its limits leave room for another token."""
        return len(self) < self.max_length

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens ``[begin, end)`` of prompt and answer, int32; -1 for pending ones."""
        known = self.output_ids[max(0, begin - self.prompt_length) : max(0, end - self.prompt_length)]
        pending = [-1] * max(0, end - max(begin, self.num_known))
        return np.concatenate([self.prompt.token_ids[begin:end], np.array(known + pending, np.int32)])

    def positions(self, begin: int, end: int) -> np.ndarray | None:
        """Positions ``[axes, end - begin]`` of the tokens ``[begin, end)``; None where rows are numbered through."""
        return self.prompt.positions_of(begin, end)

    def intervals(self, begin: int, end: int) -> dict[str, RowIntervals]:
        """Row intervals of the tokens ``[begin, end)``: the prompt's own, then causal ones."""
        return self.prompt.intervals_of(self._mask_specs, begin, end)
