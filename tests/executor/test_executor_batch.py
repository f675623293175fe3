"""A step's rows as arrays: where rows, tiles, pages and padding stand in the bucket."""

import numpy as np
import pytest

from aphrodite_jax.executor.batch import Rows, build_batch
from kernels_pallas.intervals import RowIntervals, causal


def rows(start, count, pages, slot=-1, pending=0):
    whole = causal(start + count)
    tokens = np.arange(count, dtype=np.int32) + 10 * pages[0]
    tokens[count - pending :] = -1
    return Rows(
        token_ids=tokens,
        start=start,
        prompt_length=start + count,
        intervals={"full": RowIntervals(whole.start[start:], whole.stop[start:])},
        pages=np.asarray(pages, np.int32),
        slot=slot,
    )


def build(decode, prefill, *, num_decode, num_prefill, num_requests, tile_size=2, num_pages=9):
    return build_batch(
        decode,
        prefill,
        num_decode=num_decode,
        num_prefill=num_prefill,
        num_requests=num_requests,
        tile_size=tile_size,
        mask_kinds=("full",),
        page_size=4,
        num_pages=num_pages,
        max_pages=3,
    )


def test_prefill_tiles():
    batch, offsets = build([], [rows(3, 3, [5, 2]), rows(0, 2, [7])], num_decode=0, num_prefill=8, num_requests=3)
    paged = batch.metadata.paged
    assert offsets.tolist() == [0, 4]
    assert paged.decode_rows == 0
    assert paged.tile_request.tolist() == [0, 0, 1, 0]
    assert paged.block_tables.tolist() == [[5, 2, 0], [7, 0, 0], [0, 0, 0]]
    assert paged.slots.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 36, 7 * 4, 7 * 4 + 1, 36, 36]
    assert batch.input_ids.tolist() == [50, 51, 52, 0, 70, 71, 0, 0]
    assert batch.positions.tolist() == [3, 4, 5, 0, 0, 1, 0, 0]
    assert batch.metadata.lengths.tolist() == [6, 6, 6, 1, 2, 2, 1, 1]
    assert batch.metadata.intervals["full"].stop.tolist() == [4, 5, 6, 0, 1, 2, 0, 0]
    assert batch.last_rows.tolist() == [2, 5, 0]


def test_decode_rows_are_tiles_and_may_be_pending():
    decode = [rows(5, 1, [5, 2], slot=3, pending=1), rows(0, 1, [7], slot=1)]
    batch, offsets = build(decode, [], num_decode=4, num_prefill=0, num_requests=4)
    paged = batch.metadata.paged
    assert offsets.tolist() == [0, 1]
    assert paged.decode_rows == len(paged.tile_request) == 4
    assert paged.tile_request.tolist() == [0, 1, 0, 0]
    assert paged.slots.tolist() == [2 * 4 + 1, 7 * 4, 36, 36]
    assert batch.token_slots.tolist() == [3, -1, -1, -1]
    assert batch.input_ids.tolist() == [0, 70, 0, 0]
    assert batch.metadata.intervals["full"].stop.tolist() == [6, 1, 0, 0]


def test_decode_rows_come_before_tiles():
    batch, offsets = build(
        [rows(5, 1, [5, 2])],
        [rows(0, 3, [7]), rows(4, 2, [1, 3])],
        num_decode=2,
        num_prefill=8,
        num_requests=4,
    )
    paged = batch.metadata.paged
    assert offsets.tolist() == [0, 2, 6]
    assert paged.decode_rows == 2
    assert paged.tile_request.tolist() == [0, 0, 1, 1, 2, 0]
    assert paged.block_tables.tolist() == [[5, 2, 0], [7, 0, 0], [1, 3, 0], [0, 0, 0]]
    assert batch.positions.tolist() == [5, 0, 0, 1, 2, 0, 4, 5, 0, 0]
    assert paged.slots.tolist() == [9, 36, 28, 29, 30, 36, 12, 13, 36, 36]
    assert batch.last_rows.tolist() == [0, 4, 7, 0]


def test_pages_past_the_cache_are_refused():
    with pytest.raises(ValueError, match=r"block_tables\[1, 0\] = 7 is outside pages 0 to 6"):
        build([rows(0, 1, [5]), rows(0, 1, [7])], [], num_decode=2, num_prefill=0, num_requests=2, num_pages=7)
