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

The first functions make intervals, the next take them and return others, so that a family's mask is a composition;
docs/masks.md has the table. ``offset`` is the key position of row 0, for the rows of a chunk. A row that sees
nothing, padding for instance, stays empty whatever is laid over it.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from kernels_pallas.chunk_ends import ends_cleanly, last_clean_end, reusable_prefix

__all__ = [
    "RowIntervals",
    "bidirectional_spans",
    "causal",
    "check_intervals",
    "cross",
    "ends_cleanly",
    "from_mask",
    "full",
    "last_clean_end",
    "local",
    "packed",
    "prefix",
    "reusable_prefix",
    "runs",
    "segments",
    "sort_by_group",
    "to_mask",
]


class RowIntervals(NamedTuple):
    """Keys that each query row sees: ``[start, stop)``, int32 of one shape; NumPy on the host, JAX in a program."""

    start: Any
    stop: Any


def causal(length: int, *, offset: int = 0, window: int | None = None) -> RowIntervals:
    """Rows ``offset .. offset + length`` of a causal mask; a row sees ``window`` keys at most, its own included."""
    if window is not None:
        _at_least(1, window=window)
    stop = np.arange(offset + 1, offset + length + 1, dtype=np.int32)
    start = np.zeros_like(stop) if window is None else np.maximum(stop - np.int32(window), 0)
    return RowIntervals(start, stop)


def full(length: int, *, num_keys: int | None = None) -> RowIntervals:
    """Every row sees all keys: ``length`` of them, or ``num_keys`` of another sequence."""
    return RowIntervals(np.zeros(length, np.int32), np.full(length, length if num_keys is None else num_keys, np.int32))


def local(length: int, *, before: int, after: int) -> RowIntervals:
    """Row ``i`` sees ``before`` keys before its own, its own, and ``after`` keys after it: a window both ways."""
    _at_least(0, before=before, after=after)
    row = np.arange(length, dtype=np.int32)
    return RowIntervals(np.maximum(row - np.int32(before), 0), np.minimum(row + np.int32(after + 1), np.int32(length)))


def segments(cu_seqlens: Sequence[int] | Int[np.ndarray, " n"], *, length: int | None = None) -> RowIntervals:
    """Rows of each segment ``[cu_seqlens[k], cu_seqlens[k + 1])`` see exactly their segment.

    Images of a vision tower behind one another, or its windows once patches are sorted by window
    (`sort_by_group`); ``np.cumsum([0, *lengths])`` makes ``cu_seqlens`` of lengths. Rows up to ``length``, padding
    behind the last segment, see nothing.

    Raises:
      ValueError: ``cu_seqlens`` does not start at 0, falls, or holds more than ``length`` rows.
    """
    cu = np.asarray(cu_seqlens)
    if cu.ndim != 1:
        raise ValueError(f"expected 1-D cu_seqlens, got shape {cu.shape}")
    if len(cu) == 0 or cu[0] != 0 or (np.diff(cu) < 0).any():
        raise ValueError(f"cu_seqlens start at 0 and never fall, got {cu.tolist()}")
    if length is not None and cu[-1] > length:
        raise ValueError(f"the segments hold {cu[-1]} rows, but length is {length}")
    padding = (0, 0 if length is None else length - int(cu[-1]))
    start, stop = (np.pad(np.repeat(ends, np.diff(cu)), padding) for ends in (cu[:-1], cu[1:]))
    return RowIntervals(start.astype(np.int32), stop.astype(np.int32))


def cross(
    length: int,
    rows: Sequence[tuple[int, int]],
    keys: Sequence[tuple[int, int]],
    *,
    otherwise: tuple[int, int] = (0, 0),
) -> RowIntervals:
    """Rows of ``rows[k]`` see ``keys[k]``, of another sequence: text to image rows.

    Rows of several runs see the keys of each, and rows of none see ``otherwise``.

    Raises:
      ValueError: what one row sees would have a gap, or ``rows`` and ``keys`` are not in pairs.
    """
    if len(rows) != len(keys):
        raise ValueError(f"{len(rows)} runs of rows and {len(keys)} runs of keys: expected pairs")
    result = RowIntervals(np.zeros(length, np.int32), np.zeros(length, np.int32))
    pairs = zip(_checked(keys), _checked(rows), strict=True)
    for seen, (a, b) in sorted(pairs):  # by keys, so that a gap that shows is one that stays
        empty = result.start[a:b] >= result.stop[a:b]
        result.start[a:b][empty], result.stop[a:b][empty] = seen
        _add(result, a, b, seen)
    empty = result.start >= result.stop
    (first, last), *_ = _checked([otherwise])
    result.start[empty], result.stop[empty] = first, last
    return result


def runs(flags: Bool[np.ndarray, " T"]) -> list[tuple[int, int]]:
    """Spans ``[a, b)`` of consecutive true flags, in order: of placeholder tokens, say."""
    if flags.dtype != bool or flags.ndim != 1:
        raise ValueError(f"expected bool flags [T], got {flags.dtype} {flags.shape}")
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def sort_by_group(groups: Int[np.ndarray, " T"]) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " n"]]:
    """``(order, cu_seqlens)``: ``x[order]`` stands by group, in the groups' order and each as it stood before.

    Groups that lie scattered, as the windows of an image's patches do, become segments so. ``cu_seqlens`` bounds
    them; ``np.argsort(order)`` is the way back.
    """
    if groups.ndim != 1:
        raise ValueError(f"expected one group per row, [T], got shape {groups.shape}")
    sizes = np.unique(groups, return_counts=True)[1]
    return np.argsort(groups, kind="stable"), np.cumsum([0, *sizes])


def bidirectional_spans(
    intervals: RowIntervals, spans: Iterable[tuple[int, int]], *, clamp_start: bool = False, offset: int = 0
) -> RowIntervals:
    """Rows inside a span ``[a, b)`` also see all of it; with ``clamp_start`` their start stays as it was.

    Raises:
      ValueError: a span with ``a > b`` or ``a < 0``, or one that leaves a gap in what a row sees.
    """
    result = RowIntervals(intervals.start.copy(), intervals.stop.copy())
    for a, b in _checked(spans):
        _add(result, max(a - offset, 0), max(b - offset, 0), (a, b), clamp_start=clamp_start)
    return result


def prefix(intervals: RowIntervals, length: int, *, clamp_start: bool = False, offset: int = 0) -> RowIntervals:
    """The first ``length`` rows also see each other (prefix-LM): the span ``[0, length)``."""
    return bidirectional_spans(intervals, [(0, length)], clamp_start=clamp_start, offset=offset)


def packed(intervals: RowIntervals, segments: Iterable[tuple[int, int]], *, offset: int = 0) -> RowIntervals:
    """Rows of each segment ``[a, b)`` see nothing outside it; rows of no segment see nothing at all.

    Raises:
      ValueError: segments that overlap, or have ``a > b`` or ``a < 0``.
    """
    start, stop = np.zeros_like(intervals.start), np.zeros_like(intervals.stop)
    last = (0, 0)
    for a, b in sorted((a, b) for a, b in _checked(segments) if a < b):
        if a < last[1]:
            raise ValueError(f"segments [{last[0]}, {last[1]}) and [{a}, {b}) overlap")
        last = (a, b)
        rows = slice(max(a - offset, 0), max(b - offset, 0))
        start[rows] = np.maximum(intervals.start[rows], a)
        stop[rows] = np.minimum(intervals.stop[rows], b)
    return RowIntervals(start, stop)


def to_mask(intervals: RowIntervals, num_keys: int) -> Bool[np.ndarray, "*B T S"]:
    """The mask that intervals ``[*B, T]`` stand for: whether each row sees each of ``num_keys`` keys."""
    keys = np.arange(num_keys)
    return (np.asarray(intervals.start)[..., None] <= keys) & (keys < np.asarray(intervals.stop)[..., None])


def from_mask(mask: Bool[np.ndarray, "*B T S"]) -> RowIntervals:
    """Intervals of a boolean mask; a row that sees nothing becomes ``[0, 0)``.

    Raises:
      ValueError: names the first row whose keys are not one run.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim < 2:
        raise ValueError(f"expected a bool mask [..., T, S], got {mask.dtype} {mask.shape}")
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, 1)])  # so that S = 0 has an argmax
    count, start = mask.sum(axis=-1), padded.argmax(axis=-1)
    stop = np.where(count > 0, mask.shape[-1] + 1 - padded[..., ::-1].argmax(axis=-1), 0)
    broken = stop - start != count
    if broken.any():
        row = tuple(np.argwhere(broken)[0])
        pieces = " and ".join(f"[{a}, {b})" for a, b in runs(mask[row])[:2])
        raise ValueError(f"row {_name(row)} sees keys {pieces}: not one run")
    return RowIntervals(start.astype(np.int32), stop.astype(np.int32))


def check_intervals(
    start: Int[Array | np.ndarray, "*B T"], stop: Int[Array | np.ndarray, "*B T"], num_keys: int
) -> None:
    """Check intervals into ``num_keys`` keys, on the host. Rows may be empty, but not outside.

    Raises:
      ValueError: not int32, not of one shape ``[..., T]``; or names the first row outside ``[0, num_keys]``.
    """
    if start.shape != stop.shape or not start.shape:
        raise ValueError(f"start and stop of intervals have one shape [..., T], got {start.shape} and {stop.shape}")
    if start.dtype != np.int32 or stop.dtype != np.int32:
        raise ValueError(f"intervals are int32, got {start.dtype} and {stop.dtype}")
    start, stop = np.asarray(start), np.asarray(stop)
    outside = (np.minimum(start, stop) < 0) | (np.maximum(start, stop) > num_keys)
    if outside.any():
        row = tuple(np.argwhere(outside)[0])
        raise ValueError(f"row {_name(row)} sees keys [{start[row]}, {stop[row]}), outside [0, {num_keys}]")


def _add(intervals: RowIntervals, a: int, b: int, keys: tuple[int, int], *, clamp_start: bool = False) -> None:
    """Let rows ``[a, b)`` that are not empty see ``keys`` too, in place."""
    start, stop = intervals.start[a:b], intervals.stop[a:b]
    some = (start < stop) & (keys[0] < keys[1])
    gap = some & ((stop < keys[0]) | ((start > keys[1]) & (not clamp_start)))
    if gap.any():
        i = int(np.flatnonzero(gap)[0])
        own, new = f"[{start[i]}, {stop[i]})", f"[{keys[0]}, {keys[1]})"
        raise ValueError(f"row {a + i} sees keys {own} and {new}: not one run")
    stop[some] = np.maximum(stop[some], np.int32(keys[1]))
    if not clamp_start:
        start[some] = np.minimum(start[some], np.int32(keys[0]))


def _checked(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    spans = [(operator.index(a), operator.index(b)) for a, b in spans]
    for a, b in spans:
        if not 0 <= a <= b:
            raise ValueError(f"got the span [{a}, {b}): expected 0 <= start <= stop")
    return spans


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise ValueError(f"{name} is {value}: expected {least} at least")


def _name(row: tuple) -> str:
    return str(int(row[0])) if len(row) == 1 else str(tuple(int(i) for i in row))
