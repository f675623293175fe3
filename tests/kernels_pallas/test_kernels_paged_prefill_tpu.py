"""TPU's paged prefill kernel, alone and with decode rows, in interpret mode against the reference."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import needs_libtpu

from kernels_pallas.compile_only import tpu
from kernels_pallas.paged_attention import paged_attention, pallas_tpu, pallas_tpu_prefill
from kernels_pallas.pages import page_width
from kernels_pallas.tpu_tiles import Blocks

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
DOWN = Blocks(across=False, rows=64, parts=1, keys=256, edge_rows=32, edge_keys=128, heads=2, step=128, resident=256)
ACROSS = Blocks(across=True, rows=128, parts=1, keys=256, edge_rows=128, edge_keys=128, heads=2, step=128, resident=256)
ONE_SHAPE = dict(like=(20, 100, 16), decode_rows=2, page_size=32)
"""For problems that one compiled program serves: rows, pages, and rows of decode, some of which see nothing."""
expect = jax.jit(
    functools.partial(paged_attention, implementation="reference"), static_argnames=("decode_rows", "scale", "soft_cap")
)


@functools.cache
def attend(blocks):
    """The op with blocks that make several programs and blocks of keys of a few hundred rows and keys."""

    def call(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_tpu_prefill, "blocks_for", lambda *_: blocks)
            return pallas_tpu.paged_attention(*args, **kwargs)

    return jax.jit(call, static_argnames=("decode_rows", "scale", "soft_cap", "interpret"))


def causal(before, count, window=None):
    """Intervals of ``count`` rows after ``before`` keys."""
    stop = before + 1 + np.arange(count)
    return np.maximum(stop - window, 0) if window else 0 * stop, stop


def spans(before, count, first, last, window=None):
    """As `causal`, and rows ``[first, last)`` see one another."""
    start, stop = causal(before, count, window)
    stop[first:last] = before + last
    return start, stop


def problem(
    requests, decode=(), *, N=4, K=2, H=128, page_size=16, dtype="float32", seed=0, tile=16, like=None, decode_rows=0
):
    """Arguments of `paged_attention` for ``requests`` of ``(start, stop)`` arrays, and the number of decode rows.

    ``decode`` has intervals of single rows. Pages lie in random order. NaN stands in every page and slot that no
    request has written, and in q where a row sees nothing. ``like``: tiles, pages, and pages a request, at least.
    """
    decode = [*decode, *[(0, 0)] * (decode_rows - len(decode))]
    rng = np.random.default_rng(seed)
    lengths = [stop for _, stop in decode] + [int(max(stop, default=0)) for _, stop in requests]
    counts = [-(-x // page_size) for x in lengths]
    least = sum(-(-len(start) // tile) for start, _ in requests), sum(counts) + 3, max(counts) + 1
    tiles, P, M = np.maximum(like or 0, least)
    T = len(decode) + tiles * tile
    order = rng.permutation(P)
    tables = rng.integers(0, P, (max(len(lengths), tiles), M)).astype(np.int32)
    pages = np.full((P, K, page_size, page_width(H, "tpu")), np.nan, np.float32)
    for r, length in enumerate(lengths):
        own, order = order[: counts[r]], order[counts[r] :]
        tables[r, : counts[r]] = own
        slots = np.zeros((length, K, pages.shape[3]), np.float32)
        for column in (0, pages.shape[3] // 2):
            slots[:, :, column : column + H] = rng.normal(size=(length, K, H))
        at = np.arange(length)
        pages[own[at // page_size], :, at % page_size] = slots
    start, stop = np.zeros((2, T), np.int32)
    tile_request = np.zeros(len(decode) + tiles, np.int32)
    for d, interval in enumerate(decode):
        (start[d], stop[d]), tile_request[d] = interval, d
    row = len(decode)
    for r, (low, high) in enumerate(requests, len(decode)):
        start[row : row + len(low)], stop[row : row + len(low)] = low, high
        first, size = len(decode) + (row - len(decode)) // tile, -(-len(low) // tile)
        tile_request[first : first + size] = r
        row += size * tile
    q = np.where((stop > start)[:, None, None], rng.normal(size=(T, N, H)), np.nan)
    arrays = map(jnp.asarray, (tables, tile_request, start, stop))
    return (jnp.asarray(q, dtype), jnp.asarray(pages, dtype), *arrays), len(decode)


def check(requests, decode=(), blocks=DOWN, interpret=True, soft_cap=None, **kwargs):
    arguments, decode_rows = problem(requests, decode, **kwargs)
    options = dict(decode_rows=decode_rows, scale=arguments[0].shape[2] ** -0.5, soft_cap=soft_cap)
    out, expected = attend(blocks)(*arguments, **options, interpret=interpret), expect(*arguments, **options)
    assert out.dtype == arguments[0].dtype
    tolerance = TOLERANCE[out.dtype.name]
    out, expected = (np.asarray(x.astype(jnp.float32)) for x in (out, expected))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


BOTH = pytest.mark.parametrize("blocks", [DOWN, ACROSS], ids=["down", "across"])


@BOTH
def test_kernels_paged_prefill_tpu_ragged(blocks):
    """Requests of every length about a page's and a row block's, several in a block and one over several."""
    lengths = (0, 1, 31, 32, 0, 33, 100)
    check([*(causal(0, n) for n in lengths), causal(400, 20), causal(31, 2)], blocks=blocks, **ONE_SHAPE)


@BOTH
def test_kernels_paged_prefill_tpu_masks(blocks):
    """Windows, spans of rows that see one another, rows that see nothing among others, keys that nobody sees."""
    random = np.sort(np.random.default_rng(0).integers(0, 400, (2, 60)), axis=0)
    random[1, 10:40] = random[0, 10:40]
    requests = [causal(400, 70, 100), spans(30, 60, 20, 55), spans(90, 70, 3, 64, 20), (*random,)]
    check(requests, [(0, 300), (7, 40)], blocks=blocks, **ONE_SHAPE)


@pytest.mark.once
def test_kernels_paged_prefill_tpu_whole_blocks():
    """Key blocks that all rows of a request see, before and between others; at first two requests share a program."""
    requests = [causal(300, 20), causal(270, 30), causal(440, 64), (np.full(60, 37), np.full(60, 499))]
    check(requests, **ONE_SHAPE)


def test_kernels_paged_prefill_tpu_nothing():
    check([(np.zeros(40, int), np.zeros(40, int))], **ONE_SHAPE)


@pytest.mark.once
def test_kernels_paged_prefill_tpu_soft_cap():
    check([causal(40, 50, 30), causal(0, 33), causal(0, 0)], soft_cap=2.0, N=2, page_size=64)


@pytest.mark.parametrize(
    ("N", "K", "H", "dtype", "page_size", "blocks"),
    [
        (1, 1, 64, "float32", 8, ACROSS._replace(keys=128, edge_keys=64, step=64)),
        (10, 5, 72, "float32", 32, ACROSS),
        (6, 6, 80, "bfloat16", 64, DOWN),
        (8, 8, 96, "bfloat16", 16, ACROSS._replace(keys=128)),
        (4, 1, 128, "bfloat16", 128, ACROSS),
        (32, 32, 64, "bfloat16", 256, ACROSS),
        (4, 2, 256, "float32", 384, DOWN),
    ],
)
@pytest.mark.once
def test_kernels_paged_prefill_tpu_heads(N, K, H, dtype, page_size, blocks):
    requests = [causal(280, 20), causal(page_size - 1, 2), causal(0, page_size % 33)]
    check(requests, blocks=blocks, N=N, K=K, H=H, dtype=dtype, page_size=page_size)


@settings(deadline=None, max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.once
def test_kernels_paged_prefill_tpu_random(data, seed):
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(5):
        count, before = data.draw(st.integers(0, 60)), data.draw(st.sampled_from((0, 5, 130, 256, 300)))
        if data.draw(st.booleans()):
            requests.append(causal(before, count, data.draw(st.sampled_from((None, 1, 40, 200)))))
        else:
            requests.append(tuple(np.sort(rng.integers(0, before + count + 1, (2, count)), axis=0)))
    decode = [tuple(np.sort(rng.integers(0, 300, 2)).tolist()) for _ in range(2)]
    check(requests, decode, seed=seed, **ONE_SHAPE)


@pytest.mark.once
def test_kernels_paged_prefill_tpu_tiles():
    """Tiles that don't divide a program's rows: one may stand in two of them."""
    check([causal(20, 50), causal(0, 47), causal(130, 30)], tile=24, N=2, page_size=64)


@pytest.mark.once
def test_kernels_paged_prefill_tpu_large_tables(monkeypatch):
    """Block tables that scalar memory holds a row of at a time."""
    monkeypatch.setattr(pallas_tpu_prefill, "TABLE_WORDS", 20)
    one = ACROSS._replace(heads=1)
    check([causal(500, 70), causal(0, 20), causal(100, 40)], (), one, N=2, page_size=64)
    with pytest.raises(NotImplementedError, match="at most 20 pages a request here, got 64"):
        check([causal(4000, 1)], (), one, N=2, page_size=64)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.once
def test_kernels_paged_prefill_tpu_races(mode):
    """Copies land as soon, and as late, as they may; memory is NaN until it is written."""
    races = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")  # no public way to ask
    params = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan")
    check([causal(600, 70), causal(0, 20)], [(0, 40)], interpret=params, N=2, page_size=64)
    assert not races.races.races_found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(page_size=24), "page sizes of float32"),
        (dict(dtype="float16"), "bfloat16 or float32"),
    ],
)
def test_kernels_paged_prefill_tpu_says_what_it_cannot_do(change, message):
    arguments, _ = problem([causal(0, 3)], **change)
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(*arguments, implementation="pallas_tpu", interpret=True)


def build(N, K, H, page_size, dtype="bfloat16", P=512):
    """What the compiler is given: 512 rows of prefill and 4 of decode, of up to 2048 keys."""
    call = functools.partial(pallas_tpu.paged_attention, decode_rows=4, scale=H**-0.5)
    shapes = ((516, N, H), dtype), ((P, K, page_size, page_width(H, "tpu")), dtype), ((8, 2048 // page_size), "int32")
    rows = ((36,), "int32"), ((516,), "int32"), ((516,), "int32")
    return call, [jax.ShapeDtypeStruct(shape, jnp.dtype(x)) for shape, x in (*shapes, *rows)]


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "sizes"),
    [
        ("v4", dict(N=2, K=2, H=256, page_size=128, dtype="float32")),
        ("v5e", dict(N=4, K=2, H=72, page_size=64)),
        ("v6e", dict(N=2, K=2, H=64, page_size=64)),
    ],
)
def test_kernels_paged_prefill_tpu_compiles_without_a_copy_of_the_pages(chip, sizes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    temp_bytes = []
    for P in (512, 4096):
        found = tpu.run(chip, f"{Path(__file__).stem}:build", sizes | dict(P=P), cycles=False)
        assert "error" not in found, found
        temp_bytes.append(found["temp_bytes"])
    assert temp_bytes[0] == temp_bytes[1]
