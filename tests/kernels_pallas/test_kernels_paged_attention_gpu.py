"""The GPU's paged kernels against the dense oracle a request: on a GPU where there is one, else as plain JAX."""

import itertools
from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import COMPILE_FAST, ON_GPU

from kernels_pallas import interval_attention, intervals
from kernels_pallas.intervals import RowIntervals
from kernels_pallas.paged_attention import pallas_gpu

pytestmark = pytest.mark.once

TILE_ROWS = 16

paged_attention = jax.jit(
    pallas_gpu.paged_attention,
    static_argnames=("decode_rows", "scale", "soft_cap", "interpret", "cores"),
    compiler_options=COMPILE_FAST,
)
oracle = jax.jit(
    partial(interval_attention, implementation="reference"),
    static_argnames=("scale", "soft_cap"),
    compiler_options=COMPILE_FAST,
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of ``keys`` keys and the intervals of its query rows; a decode request has one row."""

    keys: int
    rows: RowIntervals
    decode: bool = False


def decode(keys, window=None):
    """One row after ``keys - 1`` others; with no key it stands for no token."""
    empty = RowIntervals(*np.zeros((2, 1), np.int32))
    rows = intervals.causal(1, offset=keys - 1, window=window) if keys else empty
    return Request(keys=keys, rows=rows, decode=True)


def chunk(keys, rows, window=None, spans=()):
    """The last ``rows`` rows of ``keys`` keys, with bidirectional spans in key positions."""
    whole = intervals.bidirectional_spans(intervals.causal(keys, window=window), spans)
    return Request(keys=keys, rows=RowIntervals(*(x[keys - rows :] for x in whole)))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Arguments of `paged_attention`, and the oracle's answer."""

    q: np.ndarray
    pages: np.ndarray
    tables: np.ndarray
    tiles: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    decode_rows: int
    out: np.ndarray


def make(
    requests,
    *,
    num_heads,
    num_kv_heads,
    head_dim,
    page_size,
    dtype="float32",
    soft_cap=None,
    table_width=None,
    num_pages=None,
    num_tiles=0,
    beside=0,
    seed=0,
):
    """A batch whose pages lie in random order, and in which NaN stands wherever nothing may be read.

    That is: slots past a request's end, pages of nobody, keys that no row sees, and q of padding rows.

    Args:
      table_width, num_pages: of the block tables and the pages; as many as the requests need, and a few, by default.
      num_tiles: prefill tiles at least; empty ones are added.
      beside: columns of zeros beside keys and beside values.
    """
    rng = np.random.default_rng(seed)
    requests = sorted(requests, key=lambda x: not x.decode)
    counts = [-(-x.keys // page_size) for x in requests]
    num_pages = num_pages or sum(counts) + 3
    order = rng.permutation(num_pages)
    tables = rng.integers(0, num_pages, (len(requests), table_width or max(counts) + 1)).astype(np.int32)
    column = head_dim + beside
    pages = np.full((num_pages, num_kv_heads, page_size, 2 * column), np.nan, np.float32)
    # For the oracle: all requests padded to one size, and to few sizes in all.
    shape = len(requests), -(-max(x.keys for x in requests) // 128) * 128, num_kv_heads, head_dim
    k, v = (_round(rng.standard_normal(shape), dtype) for _ in range(2))
    tile_rows = [1 if x.decode else TILE_ROWS for x in requests]
    lengths = [-(-len(x.rows.start) // rows) * rows for x, rows in zip(requests, tile_rows, strict=True)]
    shape = len(requests), -(-max(lengths) // 64) * 64, num_heads, head_dim
    q = _round(rng.standard_normal(shape), dtype)
    # An empty interval need not be (0, 0).
    start, stop = np.full(q.shape[:2], 5, np.int32), np.full(q.shape[:2], 2, np.int32)
    for number, (request, count) in enumerate(zip(requests, counts, strict=True)):
        start[number, : len(request.rows.start)], stop[number, : len(request.rows.start)] = request.rows
        tables[number, :count], order = order[:count], order[count:]
        keys = np.arange(request.keys)[:, None]
        for j in keys[((request.rows.start <= keys) & (keys < request.rows.stop)).any(axis=1), 0]:
            slot = pages[tables[number, j // page_size], :, j % page_size]
            slot[:] = 0
            slot[:, :head_dim], slot[:, column : column + head_dim] = k[number, j], v[number, j]
    out = oracle(*(jnp.asarray(x) for x in (q, k, v, start, stop)), scale=head_dim**-0.5, soft_cap=soft_cap)
    q = np.where((stop <= start)[..., None, None], np.float32(np.nan), q)
    tiles = np.repeat(np.arange(len(requests), dtype=np.int32), np.floor_divide(lengths, tile_rows))
    decode_rows = sum(x.decode for x in requests)
    fill = max(0, num_tiles - (len(tiles) - decode_rows))

    def flat(x, padding):
        rows = np.concatenate([x[i, :length] for i, length in enumerate(lengths)])
        return np.pad(rows, [(0, fill * TILE_ROWS)] + [(0, 0)] * (rows.ndim - 1), constant_values=padding)

    return Batch(
        q=flat(q, np.nan),
        pages=pages,
        tables=tables,
        tiles=np.pad(tiles, (0, fill)),
        start=flat(start, 0),
        stop=flat(stop, 0),
        decode_rows=decode_rows,
        out=flat(np.asarray(out), 0),
    )


def _round(x, dtype):
    return x.astype(jnp.dtype(dtype)).astype(np.float32)


def run(batch, *, dtype="float32", soft_cap=None, cores=1):
    q, pages = (jnp.asarray(x, dtype) for x in (batch.q, batch.pages))
    tables = (jnp.asarray(x) for x in (batch.tables, batch.tiles, batch.start, batch.stop))
    scale = batch.q.shape[-1] ** -0.5
    out = paged_attention(
        q,
        pages,
        *tables,
        decode_rows=batch.decode_rows,
        scale=scale,
        soft_cap=soft_cap,
        interpret=not ON_GPU,
        cores=cores,
    )
    assert out.dtype == dtype
    return np.asarray(out, np.float32)


def check(requests, *, dtype="float32", soft_cap=None, cores=1, **options):
    batch = make(requests, dtype=dtype, soft_cap=soft_cap, **options)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    chex.assert_trees_all_close(
        run(batch, dtype=dtype, soft_cap=soft_cap, cores=cores), batch.out, rtol=tolerance, atol=tolerance
    )


MIXED = [decode(40), decode(0), chunk(83, 33), chunk(9, 1), decode(3), chunk(20, 20, spans=[(2, 19)])]
"""Prefill chunks that begin anywhere, decode rows, and an idle one."""


def test_lengths_about_a_page():
    lengths = [0, 1, 7, 8, 9, 29]
    prefill = [chunk(length, length) for length in lengths if length]
    check([*map(decode, lengths), *prefill], num_heads=4, num_kv_heads=2, head_dim=64, page_size=8)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 5, "num_kv_heads": 5, "head_dim": 72, "page_size": 32},
        {"num_heads": 12, "num_kv_heads": 6, "head_dim": 80, "page_size": 16, "beside": 48},
        {"num_heads": 7, "num_kv_heads": 1, "head_dim": 96, "page_size": 8},
        {"num_heads": 40, "num_kv_heads": 1, "head_dim": 16, "page_size": 128},
        {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "page_size": 64, "dtype": "bfloat16"},
        {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "page_size": 16, "dtype": "bfloat16"},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_head_shapes(sizes):
    check(MIXED, **sizes)


def test_windows_spans_and_soft_cap():
    requests = [
        decode(300, window=70),
        decode(40, window=16),
        chunk(150, 50, window=20),
        chunk(200, 97, window=64, spans=[(110, 140), (140, 190)]),
        chunk(70, 70, spans=[(0, 1), (30, 70)]),
    ]
    check(requests, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, soft_cap=3.0)


def test_keys_between_the_rows_intervals():
    """What stands in a gap between the intervals of a block's rows is NaN; touching intervals are no gap."""
    start = np.array([90, 0, 3, 40, 43, 43, 91, 0, 200, 10], np.int32)
    stop = np.array([95, 3, 9, 43, 99, 43, 92, 1, 201, 40], np.int32)
    apart = np.arange(0, 220, 10, dtype=np.int32)
    requests = [
        Request(keys=230, rows=RowIntervals(start, stop)),
        Request(keys=230, rows=RowIntervals(apart, apart + np.int32(2))),
        decode(20),
    ]
    check(requests, num_heads=2, num_kv_heads=2, head_dim=32, page_size=8)


@pytest.mark.parametrize("cores", [1, 16])
def test_split_contexts(cores):
    """One program and four a row: some have no block of a short context."""
    requests = [decode(900), decode(1), decode(0), decode(257, window=100)]
    assert pallas_gpu.num_splits(4, 2, 1024, cores) == {1: 1, 16: 4}[cores]
    check(requests, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, table_width=64, cores=cores)


def test_number_of_splits():
    assert pallas_gpu.num_splits(64, 8, 2048, 132) == 1
    assert pallas_gpu.num_splits(1, 8, 32768, 132) == 33
    assert pallas_gpu.num_splits(1, 1, 100, 132) == 1


@st.composite
def batches(draw):
    """Three decode rows and at most two prefill requests, of few sizes of array, so that little is compiled."""
    window = draw(st.none() | st.integers(1, 60))
    requests = [decode(draw(st.integers(0, 120)), window) for _ in range(3)]
    for _ in range(2):
        keys = draw(st.integers(1, 100))
        rows = draw(st.integers(1, min(keys, 48)))
        if draw(st.booleans()):
            cuts = sorted(draw(st.sets(st.integers(keys - rows, keys), max_size=4)))
            spans = itertools.pairwise(cuts)
            requests.append(chunk(keys, rows, window, spans))
        else:
            bounds = st.lists(st.integers(0, keys), min_size=rows, max_size=rows)
            requests.append(Request(keys=keys, rows=RowIntervals(*np.array([draw(bounds), draw(bounds)], np.int32))))
    return requests


@given(requests=batches(), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_random(requests, seed):
    sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 24, "page_size": 8}
    check(requests, seed=seed, beside=8, table_width=16, num_pages=80, num_tiles=6, **sizes)


def test_nan_that_is_seen_stays():
    """It reaches the rows that see it, and no other request or head."""
    batch = make(MIXED, num_heads=2, num_kv_heads=2, head_dim=16, page_size=8)
    number, position = batch.decode_rows, 60  # the chunk of 83 keys, whose 33 rows begin at 50
    batch.pages[batch.tables[number, position // 8], 0, position % 8, 16:] = np.nan
    rows = slice(batch.decode_rows, batch.decode_rows + 33)
    others = np.ones(batch.out.shape, bool)
    others[rows, 0] = False
    out = run(batch)
    assert np.isnan(out[rows, 0][position - 50 :]).all()
    chex.assert_trees_all_close(out[others], batch.out[others], rtol=1e-5, atol=1e-5)


def test_only_empty_rows():
    batch = make([decode(0), chunk(4, 0), chunk(8, 3)], num_heads=2, num_kv_heads=1, head_dim=16, page_size=8)
    out = paged_attention(
        jnp.asarray(batch.q), jnp.asarray(batch.pages), jnp.asarray(batch.tables), jnp.asarray(batch.tiles),
        jnp.full_like(batch.start, 3), jnp.full_like(batch.stop, 3), decode_rows=1, scale=1.0, interpret=not ON_GPU,
    )  # fmt: skip
    chex.assert_trees_all_close(np.asarray(out), np.zeros_like(batch.out), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("q_dtype", "pages_dtype", "page_size", "message"),
    [
        ("float32", "float32", 4, "powers of two of at least 8, got 4"),
        ("float32", "float32", 24, "powers of two of at least 8, got 24"),
        ("bfloat16", "int8", 16, "quantised pages are not supported yet, got int8"),
        ("bfloat16", "float8_e4m3fn", 16, "quantised pages are not supported yet, got float8_e4m3fn"),
        ("float32", "bfloat16", 16, "one dtype here, of bfloat16, float16, float32, got float32 and bfloat16"),
        ("int32", "int32", 16, "got int32 and int32"),
    ],
)
def test_what_it_can_not_do(q_dtype, pages_dtype, page_size, message):
    row = jnp.zeros(1, jnp.int32)
    q, pages = jnp.zeros((1, 2, 16), q_dtype), jnp.zeros((2, 2, page_size, 32), pages_dtype)
    with pytest.raises(NotImplementedError, match=message):
        pallas_gpu.paged_attention(q, pages, row[None], row, row, row + 1, decode_rows=1, scale=1.0, interpret=True)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: 5 GB of pages whose places pass 2**31")
def test_pages_of_more_than_2_31_numbers():
    num_pages = 20_000  # of 131,072 numbers
    rng = np.random.default_rng(0)
    rows = [_round(rng.standard_normal((8, 64, 128)), "bfloat16") for _ in range(2)]
    page = jnp.asarray(np.concatenate(rows, axis=-1), jnp.bfloat16)
    pages = jnp.zeros((num_pages, 8, 64, 256), jnp.bfloat16).at[num_pages - 1].set(page)
    q = jnp.asarray(rng.standard_normal((17, 8, 128)), jnp.bfloat16)
    ints = (jnp.asarray(x, jnp.int32) for x in ([[num_pages - 1]], [0, 0], [0] * 17, [64] * 17))
    out = paged_attention(q, pages, *ints, decode_rows=1, scale=0.1, interpret=False)
    k, v = (jnp.asarray(x.transpose(1, 0, 2))[None] for x in rows)
    start = jnp.zeros((1, 17), jnp.int32)
    wanted = oracle(q[None].astype(jnp.float32), k, v, start, start + 64, scale=0.1)[0]
    chex.assert_trees_all_close(np.asarray(out, np.float32), np.asarray(wanted), rtol=2e-2, atol=2e-2)
