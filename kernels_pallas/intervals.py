"""Row-interval masks: query row ``i`` sees the keys ``kv_start[i] <= j < kv_stop[i]``.

Every mask of a language model or vision tower that is one contiguous run of keys per row is two int32 arrays.
These are host-side NumPy functions; they return new arrays of shape ``[T]`` in key positions (tokens).

    causal text, window 3          with the span [2, 4) seeing itself
    row  start stop                row  start stop
     0     0    1                   0     0    1
     1     0    2                   1     0    2
     2     0    3                   2     0    4
     3     1    4                   3     1    4
     4     2    5                   4     2    5
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

__all__ = ["RowIntervals", "bidirectional_spans", "causal", "ends_cleanly", "full", "packed", "prefix"]


class RowIntervals(NamedTuple):
    """Keys that each query row sees: ``[start, stop)``, int32 of the same shape."""

    start: np.ndarray
    stop: np.ndarray


def causal(length: int, *, offset: int = 0, window: int | None = None) -> RowIntervals:
    """Rows ``offset .. offset + length`` of a causal mask; a row sees ``window`` keys at most, its own included."""
    stop = np.arange(offset + 1, offset + length + 1, dtype=np.int32)
    start = np.zeros_like(stop) if window is None else np.maximum(stop - np.int32(window), 0)
    return RowIntervals(start, stop)


def full(length: int) -> RowIntervals:
    """Every row sees all ``length`` keys."""
    return RowIntervals(np.zeros(length, np.int32), np.full(length, length, np.int32))


def bidirectional_spans(
    intervals: RowIntervals, spans: Iterable[tuple[int, int]], *, clamp_start: bool = False
) -> RowIntervals:
    """Rows inside a span ``[a, b)`` also see all of it; with ``clamp_start`` their start stays as it was."""
    start, stop = intervals.start.copy(), intervals.stop.copy()
    for a, b in spans:
        stop[a:b] = np.maximum(stop[a:b], b)
        if not clamp_start:
            start[a:b] = np.minimum(start[a:b], a)
    return RowIntervals(start, stop)


def prefix(intervals: RowIntervals, length: int) -> RowIntervals:
    """Every row also sees the first ``length`` keys up to their end (prefix-LM)."""
    return RowIntervals(intervals.start.copy(), np.maximum(intervals.stop, np.int32(length)))


def packed(intervals: RowIntervals, segments: Iterable[tuple[int, int]]) -> RowIntervals:
    """Rows of each segment ``[a, b)`` see nothing outside it; rows of no segment see nothing at all."""
    start, stop = np.zeros_like(intervals.start), np.zeros_like(intervals.stop)
    for a, b in segments:
        start[a:b] = np.maximum(intervals.start[a:b], a)
        stop[a:b] = np.minimum(intervals.stop[a:b], b)
    return RowIntervals(start, stop)


def ends_cleanly(stop: np.ndarray) -> np.ndarray:
    """Whether a prefill chunk or a reused prefix may end after each row: ``max(stop[: i + 1]) <= i + 1``.

    stop [2, 2, 3, 5, 5] gives [False, True, True, False, True].
    """
    return np.maximum.accumulate(stop) <= np.arange(1, len(stop) + 1)
