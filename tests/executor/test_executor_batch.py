"""A step's rows as arrays: where rows, tiles, pages and padding stand in the bucket."""

import numpy as np
import pytest

from aphrodite_jax.executor.batch import Rows, build_batch
from kernels_pallas.intervals import RowIntervals, causal


def rows(start, count, pages):
    whole = causal(start + count)
    return Rows(
        token_ids=np.arange(count, dtype=np.int32) + 10 * pages[0],
        start=start,
        prompt_length=start + count,
        intervals={"full": RowIntervals(whole.start[start:], whole.stop[start:])},
        pages=np.asarray(pages, np.int32),
    )


def build(parts, *, num_tokens, num_requests, tile_size, num_pages=9):
    return build_batch(
        parts,
        num_tokens=num_tokens,
        num_requests=num_requests,
        tile_size=tile_size,
        mask_kinds=("full",),
        page_size=4,
        num_pages=num_pages,
        max_pages=3,
    )


def test_prefill_tiles():
    batch, offsets = build([rows(3, 3, [5, 2]), rows(0, 2, [7])], num_tokens=8, num_requests=3, tile_size=2)
    paged = batch.metadata.paged
    assert offsets.tolist() == [0, 4]
    assert paged.decode_rows == 0
    assert paged.tile_request.tolist() == [0, 0, 1, 0]
    assert paged.block_tables.tolist() == [[5, 2, 0], [7, 0, 0], [0, 0, 0]]
    assert paged.slots.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 36, 7 * 4, 7 * 4 + 1, 36, 36]
    assert batch.metadata.intervals["full"].stop.tolist() == [4, 5, 6, 0, 1, 2, 0, 0]
    assert batch.last_rows.tolist() == [2, 5, 0]


def test_decode_rows_are_tiles():
    batch, offsets = build([rows(5, 1, [5, 2]), rows(0, 1, [7])], num_tokens=4, num_requests=4, tile_size=1)
    paged = batch.metadata.paged
    assert offsets.tolist() == [0, 1]
    assert paged.decode_rows == len(paged.tile_request) == 4
    assert paged.tile_request.tolist() == [0, 1, 0, 0]
    assert paged.slots.tolist() == [2 * 4 + 1, 7 * 4, 36, 36]
    assert batch.metadata.intervals["full"].stop.tolist() == [6, 1, 0, 0]


def test_pages_past_the_cache_are_refused():
    with pytest.raises(ValueError, match=r"block_tables\[1, 0\] = 7 is outside pages 0 to 6"):
        build([rows(0, 1, [5]), rows(0, 1, [7])], num_tokens=2, num_requests=2, tile_size=1, num_pages=7)
