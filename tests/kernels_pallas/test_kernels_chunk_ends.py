"""Where a prompt may be cut: by the mask itself, entry by entry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import mask_of

from kernels_pallas import intervals
from kernels_pallas.chunk_ends import ends_cleanly, last_clean_end, reusable_prefix

lengths = st.integers(1, 24)


@st.composite
def ranges(draw, length: int):
    """Disjoint ranges ``(a, b)`` inside ``length``, in order; empty ones too."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    return list(zip(cuts[::2], cuts[1::2], strict=False))


@given(st.data(), lengths)
@settings(deadline=None)
def test_kernels_chunk_ends_cleanly(data, length):
    """A chunk may end at e where no row before e sees a key at e or later: by the mask, entry by entry."""
    rows = intervals.bidirectional_spans(intervals.causal(length), data.draw(ranges(length)))
    seen = mask_of(*rows, length)
    expected = [not seen[:e, e:].any() for e in range(1, length + 1)]
    assert ends_cleanly(rows.stop).tolist() == expected


@given(st.lists(st.integers(0, 30), min_size=1, max_size=24))
@settings(deadline=None)
def test_kernels_chunk_ends_cleanly_for_any_stops(stops):
    expected = [max(stops[:e]) <= e for e in range(1, len(stops) + 1)]
    assert ends_cleanly(np.asarray(stops, np.int32)).tolist() == expected


@given(st.data(), lengths, st.integers(0, 30), st.integers(1, 5))
@settings(deadline=None)
def test_kernels_chunk_last_clean_end(data, length, limit, page_size):
    rows = intervals.bidirectional_spans(intervals.causal(length), data.draw(ranges(length)))
    seen = mask_of(*rows, length)
    clean = [e for e in range(1, min(limit, length) + 1) if not seen[:e, e:].any()]
    assert last_clean_end(rows.stop, limit) == max(clean, default=0)
    begin = data.draw(st.sampled_from([0, *clean]))
    after = [e for e in clean if e > begin]
    assert last_clean_end(rows.stop, limit, begin=begin) == max(after, default=begin)
    pages = [e for e in clean if e % page_size == 0]
    assert reusable_prefix(rows.stop, limit, page_size=page_size) == max(pages, default=0)


def test_kernels_chunk_clean_ends_of_several_mask_kinds():
    """An end that is clean under one kind alone is none: the elementwise maximum of their stops tells."""
    one = intervals.bidirectional_spans(intervals.causal(8), [(1, 3)]).stop
    other = intervals.bidirectional_spans(intervals.causal(8), [(2, 6)]).stop
    both = np.maximum(one, other)
    np.testing.assert_array_equal(ends_cleanly(both), ends_cleanly(one) & ends_cleanly(other))
    assert last_clean_end(both, 5) == 1


def test_kernels_chunk_without_room_ends_where_it_begins():
    stop = intervals.causal(8).stop
    assert last_clean_end(stop, 4, begin=5) == 5
    assert last_clean_end(stop, 5, begin=5) == 5
    assert last_clean_end(stop, 0) == 0


def test_kernels_chunk_clean_end_errors():
    stop = intervals.causal(4).stop
    with pytest.raises(ValueError, match="limit is -1"):
        last_clean_end(stop, -1)
    with pytest.raises(ValueError, match="begin is 5 of 4 rows"):
        last_clean_end(stop, 4, begin=5)
    with pytest.raises(ValueError, match="page_size is 0"):
        reusable_prefix(stop, 4, page_size=0)
