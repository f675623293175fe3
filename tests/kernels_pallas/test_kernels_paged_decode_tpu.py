"""TPU's decode kernel in interpret mode against attention written out in NumPy, one row and head at a time."""

import functools
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
from kernels_pallas.paged_attention import pallas_tpu_decode
from kernels_pallas.paged_attention.pallas_tpu_decode import decode
from kernels_pallas.pages import page_width

pytestmark = pytest.mark.once

attend = jax.jit(decode, static_argnames=("scale", "soft_cap", "interpret"))
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def oracle(q, k, v, start, stop, scale, soft_cap):
    """One row's attention ``[N, H]`` in float64 over ``[S, K, H]``."""
    out = np.zeros(q.shape)
    for n in range(len(q)) if stop > start else ():
        head = n * k.shape[1] // len(q)
        scores = k[start:stop, head].astype(np.float64) @ q[n].astype(np.float64) * scale
        if soft_cap is not None:
            scores = np.tanh(scores / soft_cap) * soft_cap
        weights = np.exp(scores - scores.max())
        out[n] = weights @ v[start:stop, head].astype(np.float64) / weights.sum()
    return out


def problem(rows, *, N=4, K=2, H=128, page_size=16, dtype="float32", soft_cap=None, seed=0):
    """Arguments of `decode` and its expected output, for ``rows`` of ``(start, stop)``.

    Pages lie in random order. What no row sees is NaN: other slots, pages of nobody, the q of rows that see nothing.
    """
    rng = np.random.default_rng(seed)
    D, W = len(rows), page_width(H, "tpu")
    counts = [-(-max(stop, 0) // page_size) for _, stop in rows]
    P, M = sum(counts) + 3, max(1, *counts) + 1
    if D == 12:  # one shape for all, so that one compiled program serves them
        P, M = 4096 // page_size, 800 // page_size
    order = rng.permutation(P)
    request = rng.permutation(D).astype(np.int32)
    tables = rng.integers(0, P, (D, M)).astype(np.int32)
    pages = np.full((P, K, page_size, W), np.nan, np.float32)
    q = np.asarray(jnp.asarray(rng.normal(size=(D, N, H)), dtype).astype(np.float32))
    q = np.where(np.array([[[stop <= start]] for start, stop in rows]), np.float32(np.nan), q)
    out, scale = [], H**-0.5
    for d, (start, stop) in enumerate(rows):
        own, order = order[: counts[d]], order[counts[d] :]
        tables[request[d], : counts[d]] = own
        k, v = np.asarray(jnp.asarray(rng.normal(size=(2, max(stop, 0), K, H)), dtype).astype(np.float32))
        for j in range(start, stop):
            slot = np.zeros((K, W), np.float32)
            slot[:, :H], slot[:, W // 2 : W // 2 + H] = k[j], v[j]
            pages[own[j // page_size], :, j % page_size] = slot
        out.append(oracle(q[d], k, v, start, stop, scale, soft_cap))
    start, stop = np.array(rows, np.int32).T
    arguments = (jnp.asarray(q, dtype), jnp.asarray(pages, dtype), *map(jnp.asarray, (tables, request, start, stop)))
    return arguments, dict(scale=scale, soft_cap=soft_cap), np.stack(out)


def check(rows, interpret=True, attend=attend, **kwargs):
    arguments, options, expected = problem(rows, **kwargs)
    out = attend(*arguments, **options, interpret=interpret)
    assert out.dtype == arguments[0].dtype
    assert out.shape == arguments[0].shape
    tolerance = TOLERANCE[out.dtype.name]
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and grid steps in problems of a few hundred keys and a few rows."""
    monkeypatch.setattr(pallas_tpu_decode, "BLOCK_KEYS", 256)
    monkeypatch.setattr(pallas_tpu_decode, "ROWS", 2)


EMPTY = (0, 0)


@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_kernels_paged_decode_tpu_ragged(page_size):
    lengths = (0, 1, page_size - 1, 300, 0, 0, page_size, page_size + 1, 600, 257, 256, 0)
    check([(0, x) for x in lengths], page_size=page_size, **({} if page_size == 16 else dict(N=2, K=1)))


@pytest.mark.parametrize(
    "rows",
    [
        [EMPTY, (7, 3)],
        [(100, 700), (129, 300), (0, 40), (640, 700), (255, 513)],
        [(256, 512), (256, 768), (0, 768), (128, 640)],
        [*[EMPTY] * 5, (3, 700), (5, 6)],
        [*[(2, 1)] * 11, (31, 33)],
    ],
    ids=["nothing", "windows", "whole-blocks", "few", "last"],
)
def test_kernels_paged_decode_tpu_intervals(rows):
    check([*rows, *[EMPTY] * (12 - len(rows))])


def test_kernels_paged_decode_tpu_one_row():
    check([(40, 300)])


@pytest.mark.parametrize(
    ("H", "dtype"), [(8, "float32"), *((H, "bfloat16") for H in (64, 72, 80, 96, 128)), (256, "float32")]
)
def test_kernels_paged_decode_tpu_head_sizes(H, dtype):
    check([(0, 100), EMPTY, (10, 30)], N=2, K=1, H=H, dtype=dtype, page_size=32)


@pytest.mark.parametrize(("N", "K"), [(8, 1), (10, 5), (54, 6), (8, 8)])
def test_kernels_paged_decode_tpu_heads(N, K):
    check([(0, 100), EMPTY, (20, 50)], N=N, K=K, H=64)


def test_kernels_paged_decode_tpu_soft_cap():
    check([(0, 100), (40, 50), (0, 1)], soft_cap=1.5)


def test_kernels_paged_decode_tpu_rows_may_share_a_request():
    (q, pages, tables, request, start, stop), options, expected = problem([(0, 100), (0, 40)], N=2, K=1)
    first = functools.partial(jnp.take, indices=jnp.zeros(2, jnp.int32), axis=0)
    out = attend(q, pages, tables, first(request), first(start), first(stop), **options, interpret=True)
    np.testing.assert_allclose(out[0], expected[0], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(out[1] - expected[1])).max() > 0.05


def test_kernels_paged_decode_tpu_long_tables_take_several_calls(monkeypatch):
    monkeypatch.setattr(pallas_tpu_decode, "TABLE_WORDS", 30)
    rows = [(0, 200), (0, 1), (0, 5)]  # tables of 14 pages, so two rows a call
    check(rows, N=1, K=1, attend=decode)
    monkeypatch.setattr(pallas_tpu_decode, "TABLE_WORDS", 13)
    with pytest.raises(NotImplementedError, match="at most 13 pages a request here, got 14"):
        check(rows, N=1, K=1, attend=decode)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_kernels_paged_decode_tpu_random(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, rng.choice([40, 300, 650]), (6, 2))
    rows = np.where(rng.random((6, 1)) < 0.7, np.sort(rows, axis=1), rows)
    check(rng.permutation([*rows.tolist(), *[EMPTY] * 6]).tolist(), seed=seed)


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize(
    ("page_size", "K", "rows"),
    [
        (128, 2, [EMPTY, (0, 700), (0, 1), EMPTY, (200, 513), (0, 300)]),
        (16, 1, [(0, 33), (0, 300), EMPTY, (0, 256)]),
        (256, 12, [(0, 300), EMPTY, (255, 257)]),
    ],
    ids=["parts", "small-pages", "head-groups"],
)
def test_kernels_paged_decode_tpu_copies_do_not_race(page_size, K, rows, mode, capsys, monkeypatch):
    monkeypatch.setattr(pallas_tpu_decode, "SHARDS", 1)  # so that every buffer is used again
    monkeypatch.setattr(pallas_tpu_decode, "BUFFERS", 3)
    params = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan")
    check(rows, N=K, K=K, page_size=page_size, interpret=params)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "page_size", "W", "message"),
    [
        ("bfloat16", 8, 256, "page sizes of bfloat16 on TPU are powers of two from 16 to 128, .* got 8"),
        ("float32", 4, 256, "page sizes of float32 on TPU are powers of two from 8 to 128, .* got 4"),
        ("float32", 48, 256, "or multiples of 128, got 48"),
        ("float32", 16, 192, "W = 128, or a multiple of 256, got 192"),
        ("float32", 16, 384, "W = 128, or a multiple of 256, got 384"),
        ("float16", 16, 256, "float32, got float16 and float16"),
        ("int8", 32, 256, "float32, got int8 and int8"),
    ],
)
def test_kernels_paged_decode_tpu_says_what_it_cannot_do(dtype, page_size, W, message):
    q, pages = jnp.zeros((1, 2, 64), dtype), jnp.zeros((3, 2, page_size, W), dtype)
    one = jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        decode(q, pages, one[None], one, one, one, scale=1.0, soft_cap=None, interpret=True)


def build(N, K, H, page_size, dtype="bfloat16", P=512):
    """What the compiler is given: 64 requests of up to 2048 keys."""
    shapes = ((64, N, H), dtype), ((P, K, page_size, page_width(H, "tpu")), dtype), ((64, 2048 // page_size), "int32")
    rows = [((64,), "int32")] * 3
    call = functools.partial(decode, scale=H**-0.5, soft_cap=None)
    return call, [jax.ShapeDtypeStruct(shape, jnp.dtype(x)) for shape, x in (*shapes, *rows)]


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "sizes"),
    [
        ("v4", dict(N=32, K=8, H=128, page_size=16)),
        ("v5e", dict(N=16, K=16, H=64, page_size=16)),
        ("v6e", dict(N=8, K=4, H=256, page_size=64)),
    ],
)
def test_kernels_paged_decode_tpu_compiles_without_a_copy_of_the_pages(chip, sizes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = tpu.run(chip, f"{Path(__file__).stem}:build", sizes, cycles=False)
    assert "error" not in found
    page_bytes = 512 * sizes["K"] * sizes["page_size"] * page_width(sizes["H"], "tpu") * 2
    assert found["temp_bytes"] < page_bytes / 10
