"""Row intervals against the T x S masks that they stand for, alone and composed."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
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


@given(lengths, st.none() | lengths)
@settings(deadline=None)
def test_kernels_intervals_full(length, num_keys):
    rows = intervals.full(length, num_keys=num_keys)
    assert mask(rows, num_keys or length).shape == (length, num_keys or length)
    assert mask(rows, num_keys or length).all()


@given(lengths, st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_kernels_intervals_local(length, before, after):
    ahead = np.arange(length) - np.arange(length)[:, None]
    rows = intervals.local(length, before=before, after=after)
    np.testing.assert_array_equal(mask(rows, length), (-before <= ahead) & (ahead <= after))


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(0, 5))
@settings(deadline=None)
def test_kernels_intervals_segments(sizes, padding):
    cu_seqlens = np.cumsum([0, *sizes])
    length = int(cu_seqlens[-1])
    rows = intervals.segments(cu_seqlens)
    np.testing.assert_array_equal(mask(rows, length), inside(pairwise(cu_seqlens), length))
    padded = intervals.segments(cu_seqlens, length=length + padding)
    np.testing.assert_array_equal(padded.start[:length], rows.start)
    np.testing.assert_array_equal(padded.stop[:length], rows.stop)
    assert len(padded.start) == len(padded.stop) == length + padding
    assert not mask(padded, length + padding)[length:].any()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24))
@settings(deadline=None)
def test_kernels_intervals_sort_by_group(groups):
    order, cu_seqlens = intervals.sort_by_group(np.asarray(groups))
    assert sorted(order.tolist()) == list(range(len(groups)))
    by_group = [[i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))]
    assert [order[a:b].tolist() for a, b in pairwise(cu_seqlens)] == by_group


@given(st.lists(st.booleans(), max_size=24))
@settings(deadline=None)
def test_kernels_intervals_runs(flags):
    spans = intervals.runs(np.asarray(flags, bool))
    assert [any(a <= i < b for a, b in spans) for i in range(len(flags))] == flags
    assert all(a < b for a, b in spans)
    assert all(b < a for (_, b), (a, _) in pairwise(spans))


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


@given(st.data(), lengths, st.none() | st.integers(1, 30), st.booleans())
@settings(deadline=None)
def test_kernels_intervals_prefix(data, length, window, clamp_start):
    """Rows of the prefix see all of it, or what of it stands in their window; later rows keep their window."""
    prefix = data.draw(st.integers(0, length))
    plain = intervals.causal(length, window=window)
    rows = intervals.prefix(plain, prefix, clamp_start=clamp_start)
    seen = inside([(0, prefix)], length)
    if clamp_start:
        seen &= np.arange(length) >= plain.start[:, None]
    np.testing.assert_array_equal(mask(rows, length), causal_mask(length, window) | seen)


@given(st.data(), lengths, st.none() | st.integers(1, 30), st.booleans())
@settings(deadline=None)
def test_kernels_intervals_offset_cuts_a_chunk_out(data, length, window, clamp_start):
    """Composing a chunk's rows at their offset gives the rows of the whole."""
    begin = data.draw(st.integers(0, length))
    end = data.draw(st.integers(begin, length))
    spans, prefix = data.draw(ranges(length)), data.draw(st.integers(0, length))

    def build(rows, offset):
        rows = intervals.bidirectional_spans(rows, spans, clamp_start=clamp_start, offset=offset)
        rows = intervals.prefix(rows, prefix, clamp_start=clamp_start, offset=offset)
        return intervals.packed(rows, [(0, prefix), (prefix, length)], offset=offset)

    chunk = build(intervals.causal(end - begin, offset=begin, window=window), begin)
    whole = build(intervals.causal(length, window=window), 0)
    np.testing.assert_array_equal(chunk, [whole.start[begin:end], whole.stop[begin:end]])


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
def test_kernels_intervals_empty_rows_stay_empty(data, length):
    """Padding stays padding, whatever spans and prefixes are laid over it."""
    segments = data.draw(ranges(length))
    rows = intervals.packed(intervals.causal(length), segments)
    rows = intervals.bidirectional_spans(rows, data.draw(ranges(length)))
    rows = intervals.prefix(rows, data.draw(st.integers(0, length)))
    assert (mask(rows, length).any(axis=1) == inside(segments, length).any(axis=1)).all()


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), max_size=6), st.integers(1, 12))
@settings(deadline=None)
def test_kernels_intervals_cross(items, length):
    """Rows ``[a, b)`` see keys ``[x, y)``: what all items say of a row together, or an error where it has a gap."""
    rows_and_keys = [((min(a, b), max(a, b)), (min(x, y), max(x, y))) for a, b, x, y in items]
    expected = np.zeros((length, 9), bool)
    for (a, b), (x, y) in rows_and_keys:
        expected[a:b, x:y] = True
    expected[~expected.any(axis=1), 2:7] = True
    one_run = ((np.diff(expected.astype(int), axis=1, prepend=0, append=0) == 1).sum(axis=1) <= 1).all()
    runs_of_rows, runs_of_keys = zip(*rows_and_keys, strict=True) if items else ((), ())
    if one_run:
        rows = intervals.cross(length, runs_of_rows, runs_of_keys, otherwise=(2, 7))
        np.testing.assert_array_equal(mask(rows, 9), expected)
    else:
        with pytest.raises(ValueError, match="not one run"):
            intervals.cross(length, runs_of_rows, runs_of_keys, otherwise=(2, 7))


def test_kernels_intervals_clamped_span_behind_the_window():
    """With ``clamp_start`` a span that ends before a row's window adds nothing; without, there would be a gap."""
    rows = RowIntervals(np.int32([5, 5, 5]), np.int32([6, 6, 6]))
    clamped = intervals.bidirectional_spans(rows, [(0, 2)], clamp_start=True)
    np.testing.assert_array_equal(clamped, rows)
    with pytest.raises(ValueError, match=r"row 0 sees keys \[5, 6\) and \[0, 2\): not one run"):
        intervals.bidirectional_spans(rows, [(0, 2)])


def test_kernels_intervals_packed_takes_empty_segments_anywhere():
    rows = intervals.causal(6)
    np.testing.assert_array_equal(
        intervals.packed(rows, [(0, 4), (2, 2), (4, 4), (4, 6)]), intervals.packed(rows, [(0, 4), (4, 6)])
    )


WRONG = {
    "span": (lambda: intervals.bidirectional_spans(intervals.full(4), [(0, 1), (3, 2)]), r"\[3, 2\).*start <= stop"),
    "negative": (lambda: intervals.bidirectional_spans(intervals.full(4), [(-2, 1)]), r"\[-2, 1\)"),
    "prefix": (lambda: intervals.prefix(intervals.full(4), -1), r"\[0, -1\)"),
    "segment": (lambda: intervals.packed(intervals.full(4), [(2, 4), (1, 3)]), r"\[1, 3\) and \[2, 4\) overlap"),
    "window": (lambda: intervals.causal(4, window=0), "window is 0"),
    "before": (lambda: intervals.local(4, before=-1, after=2), "before is -1"),
    "after": (lambda: intervals.local(4, before=1, after=-2), "after is -2"),
    "lengths for cu_seqlens": (lambda: intervals.segments([3, 5]), r"start at 0.*\[3, 5\]"),
    "falling cu_seqlens": (lambda: intervals.segments([0, 5, 4]), r"never fall.*\[0, 5, 4\]"),
    "short": (lambda: intervals.segments([0, 5], length=4), "5 rows.*length is 4"),
    "nested cu_seqlens": (lambda: intervals.segments([[0, 5]]), r"1-D.*\(1, 2\)"),
    "groups": (lambda: intervals.sort_by_group(np.zeros((2, 2))), r"\(2, 2\)"),
    "flags": (lambda: intervals.runs(np.array([0, 1])), "int64"),
    "gap": (
        lambda: intervals.bidirectional_spans(RowIntervals(np.int32([0] * 4), np.int32([1] * 4)), [(2, 4)]),
        r"row 2 sees keys \[0, 1\) and \[2, 4\): not one run",
    ),
    "pieces": (lambda: intervals.cross(4, [(0, 2)], []), "1 runs of rows and 0 runs of keys"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "message"), WRONG.values(), ids=WRONG)
def test_kernels_intervals_errors_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@given(st.data(), st.sampled_from([(), (2,), (2, 3)]), st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None)
def test_kernels_intervals_to_mask_and_back(data, batch, T, S):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    start, stop = rng.integers(0, S + 1, (2, *batch, T)).astype(np.int32)
    dense = intervals.to_mask(RowIntervals(start, stop), S)
    np.testing.assert_array_equal(dense, mask_of(start, stop, S))
    back = intervals.from_mask(dense)
    assert back.start.dtype == back.stop.dtype == np.int32
    np.testing.assert_array_equal(back.start, np.where(stop > start, start, 0))
    np.testing.assert_array_equal(back.stop, np.where(stop > start, stop, 0))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(3, 7))
@settings(deadline=None)
def test_kernels_intervals_from_mask_names_the_first_row_with_a_gap(seed, T, S):
    dense = np.random.default_rng(seed).random((T, S)) < 0.6
    gaps = [i for i in range(T) if "01" in "".join("01"[int(x)] for x in dense[i]).strip("0")]
    if gaps:
        with pytest.raises(ValueError, match=rf"row {gaps[0]} sees .*not one run"):
            intervals.from_mask(dense)
        batched = np.stack([np.zeros_like(dense), dense])
        with pytest.raises(ValueError, match=rf"row \(1, {gaps[0]}\) sees"):
            intervals.from_mask(batched)
    else:
        np.testing.assert_array_equal(intervals.to_mask(intervals.from_mask(dense), S), dense)


def test_kernels_intervals_from_mask_takes_booleans_alone():
    with pytest.raises(ValueError, match="float64"):
        intervals.from_mask(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        intervals.from_mask(np.zeros(4, bool))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_kernels_intervals_check(array):
    zeros = array(np.zeros((2, 3), np.int32))

    def changed(value):
        x = np.zeros((2, 3), np.int32)
        x[1, 1] = value
        x[1, 2] = 99
        return array(x)

    intervals.check_intervals(zeros, zeros, 0)
    intervals.check_intervals(array(np.int32([3, 0])), array(np.int32([0, 3])), 3)  # the first row is empty, and fine
    for start, stop in ((zeros, changed(8)), (zeros, changed(-1)), (changed(8), zeros), (changed(-1), zeros)):
        message = rf"row \(1, 1\) sees keys \[{int(start[1, 1])}, {int(stop[1, 1])}\), outside \[0, 7\]"
        with pytest.raises(ValueError, match=message):
            intervals.check_intervals(start, stop, 7)
    with pytest.raises(ValueError, match="row 1 sees"):
        intervals.check_intervals(changed(8)[1], zeros[1], 7)
    with pytest.raises(ValueError, match="int32, got int32 and float32"):
        intervals.check_intervals(zeros, zeros.astype(np.float32), 7)
    with pytest.raises(ValueError, match="int32, got int16 and int32"):
        intervals.check_intervals(zeros.astype(np.int16), zeros, 7)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        intervals.check_intervals(zeros, zeros[0], 7)
    with pytest.raises(ValueError, match=r"\(\) and \(\)"):
        intervals.check_intervals(zeros[0, 0], zeros[0, 0], 7)
