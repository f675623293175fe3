"""Row intervals against the T x S masks that they stand for, alone and composed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import mask_of

from kernels_pallas import intervals
from kernels_pallas.intervals import RowIntervals

lengths = st.integers(1, 24)


@st.composite
def ranges(draw, length: int):
    """Disjoint ranges ``(a, b)`` inside ``length``, in order; empty ones too."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    return list(zip(cuts[::2], cuts[1::2], strict=False))


def mask(rows: RowIntervals, S: int) -> np.ndarray:
    assert rows.start.dtype == rows.stop.dtype == np.int32
    assert (rows.start >= 0).all()
    assert (rows.stop <= S).all()
    return mask_of(*rows, S)


def causal_mask(T: int, window: int | None = None, offset: int = 0) -> np.ndarray:
    i, j = np.arange(offset, offset + T)[:, None], np.arange(offset + T)
    return (j <= i) & (True if window is None else j > i - window)


def inside(ranges, length: int) -> np.ndarray:
    """``[T, T]``: whether row and key stand in the same range."""
    same = np.zeros((length, length), bool)
    for a, b in ranges:
        same[a:b, a:b] = True
    return same


@given(lengths, st.integers(0, 9), st.none() | st.integers(1, 30))
@settings(deadline=None)
def test_kernels_intervals_causal(length, offset, window):
    rows = intervals.causal(length, offset=offset, window=window)
    np.testing.assert_array_equal(mask(rows, offset + length), causal_mask(length, window, offset))


@given(lengths)
@settings(deadline=None)
def test_kernels_intervals_full(length):
    assert mask(intervals.full(length), length).all()


@given(st.data(), lengths, st.none() | st.integers(1, 30), st.booleans())
@settings(deadline=None)
def test_kernels_intervals_bidirectional_spans(data, length, window, clamp_start):
    spans = data.draw(ranges(length))
    plain = intervals.causal(length, window=window)
    rows = intervals.bidirectional_spans(plain, spans, clamp_start=clamp_start)
    seen = inside(spans, length)
    if clamp_start:
        seen &= np.arange(length) >= plain.start[:, None]
    np.testing.assert_array_equal(mask(rows, length), causal_mask(length, window) | seen)


@given(st.data(), lengths)
@settings(deadline=None)
def test_kernels_intervals_prefix(data, length):
    prefix = data.draw(st.integers(0, length))
    rows = intervals.prefix(intervals.causal(length), prefix)
    np.testing.assert_array_equal(mask(rows, length), causal_mask(length) | (np.arange(length) < prefix))


@given(st.data(), lengths, st.none() | st.integers(1, 30))
@settings(deadline=None)
def test_kernels_intervals_packed(data, length, window):
    segments = data.draw(ranges(length))
    rows = intervals.packed(intervals.causal(length, window=window), segments)
    np.testing.assert_array_equal(mask(rows, length), causal_mask(length, window) & inside(segments, length))


@given(st.data(), lengths, st.none() | st.integers(1, 30))
@settings(deadline=None)
def test_kernels_intervals_compose(data, length, window):
    """Packed segments of a prefix mask with spans: the masks' own union and intersection."""
    segments = data.draw(ranges(length))
    spans = [(a, b) for a, b in data.draw(ranges(length)) if inside(segments, length)[a:b, a:b].all()]
    rows = intervals.bidirectional_spans(intervals.causal(length, window=window), spans)
    rows = intervals.packed(rows, segments)
    expected = (causal_mask(length, window) | inside(spans, length)) & inside(segments, length)
    np.testing.assert_array_equal(mask(rows, length), expected)
    prefix = data.draw(st.integers(0, length))
    both = intervals.prefix(intervals.bidirectional_spans(intervals.causal(length), spans), prefix)
    expected = causal_mask(length) | inside(spans, length) | (np.arange(length) < prefix)
    np.testing.assert_array_equal(mask(both, length), expected)


@given(st.data(), lengths)
@settings(deadline=None)
def test_kernels_intervals_leave_their_arguments_alone(data, length):
    before = intervals.causal(length, window=3)
    kept = RowIntervals(before.start.copy(), before.stop.copy())
    pieces = data.draw(ranges(length))
    for made in (
        intervals.bidirectional_spans(before, pieces),
        intervals.packed(before, pieces),
        intervals.prefix(before, length),
    ):
        made.start[:], made.stop[:] = -1, -1
        np.testing.assert_array_equal(before, kept)


@given(st.data(), lengths)
@settings(deadline=None)
def test_kernels_intervals_ends_cleanly(data, length):
    """A chunk may end at e where no row before e sees a key at e or later: by the mask, entry by entry."""
    rows = intervals.bidirectional_spans(intervals.causal(length), data.draw(ranges(length)))
    seen = mask(rows, length)
    expected = [not seen[:e, e:].any() for e in range(1, length + 1)]
    assert intervals.ends_cleanly(rows.stop).tolist() == expected


@given(st.lists(st.integers(0, 30), min_size=1, max_size=24))
@settings(deadline=None)
def test_kernels_intervals_ends_cleanly_for_any_stops(stops):
    expected = [max(stops[:e]) <= e for e in range(1, len(stops) + 1)]
    assert intervals.ends_cleanly(np.asarray(stops, np.int32)).tolist() == expected
