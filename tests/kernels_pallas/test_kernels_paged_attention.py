"""Paged attention: the XLA form, the reference, and dense attention of each request's gathered keys agree."""

from functools import cache, partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import dense_oracle, mask_of, seeds

from kernels_pallas import paged_attention
from kernels_pallas.paged_attention import check_block_tables, reference, xla
from kernels_pallas.pages import split


class Geometry(NamedTuple):
    """Requests, their pages, heads, width; rows of a tile, tiles, decode rows before them; the XLA form's options."""

    R: int
    M: int
    page_size: int
    N: int
    K: int
    H: int
    W: int
    tile_rows: int
    tiles: int
    decode_rows: int
    options: dict
    soft_cap: float | None = None


# Small blocks and groups run the loops that real sizes run.
GEOMETRIES = {
    "decode": Geometry(5, 7, 4, 4, 2, 8, 16, 0, 0, 6, {"block_tokens": 8}),
    "decode, one block": Geometry(3, 3, 5, 3, 1, 5, 10, 0, 0, 3, {}),
    "decode, a page a block": Geometry(3, 4, 5, 6, 3, 5, 32, 0, 0, 4, {"block_tokens": 1}),
    "prefill": Geometry(3, 6, 4, 4, 2, 8, 16, 4, 11, 0, {"block_tokens": 8, "group_rows": 16}, 2.0),
    "prefill, tile by tile": Geometry(4, 5, 2, 2, 2, 4, 12, 2, 9, 0, {"block_tokens": 4, "group_rows": 1}),
    "prefill, one group": Geometry(2, 4, 3, 2, 1, 7, 14, 3, 5, 0, {}),
    "prefill, tiles of one row": Geometry(2, 4, 3, 2, 1, 7, 14, 1, 5, 0, {}),
    "mixed": Geometry(6, 5, 4, 4, 2, 8, 24, 4, 7, 5, {"block_tokens": 8, "group_rows": 8}, 2.0),
    "mixed, one of each": Geometry(2, 3, 2, 6, 1, 4, 8, 4, 1, 1, {}),
}
names = st.sampled_from(sorted(GEOMETRIES))


class Case(NamedTuple):
    """Arguments of the call."""

    q: jax.Array
    pages: jax.Array
    block_tables: jax.Array
    tile_request: jax.Array
    kv_start: jax.Array
    kv_stop: jax.Array


def request_of_row(g: Geometry, tile_request) -> np.ndarray:
    """Request of each row: the first are tiles of their own."""
    decode, prefill = np.split(np.asarray(tile_request), [g.decode_rows])
    return np.concatenate([decode, np.repeat(prefill, g.tile_rows)])


def draw(name, seed, dtype=jnp.float32) -> Case:
    """Requests of random lengths whose last rows are computed: ragged tiles, pages in random order.

    NaN fills every slot that no row sees, every page that no request has, and the queries of padding rows.
    """
    g, rng = GEOMETRIES[name], np.random.default_rng(seed)
    most = g.M * g.page_size
    P = g.R * g.M + 2
    tables = rng.permutation(P)[: g.R * g.M].reshape(g.R, g.M)
    prefill = rng.integers(0, g.R, g.tiles)
    if rng.random() < 0.7:
        prefill = np.sort(prefill)  # as the engine lays them out
    tile_request = np.concatenate([rng.integers(0, g.R, g.decode_rows), prefill])
    request = request_of_row(g, tile_request)
    T = len(request)
    stop = np.zeros(T, np.int64)
    for r in range(g.R):
        rows = np.flatnonzero(request == r)
        used = min(len(rows), rng.integers(0, most + 1))  # rows past these pad the request's last tiles
        length = rng.integers(used, most + 1)
        stop[rows[:used]] = np.arange(length - used, length) + 1
        if g.tile_rows > 1 and used and rng.random() < 0.5:  # a span whose rows see each other
            span = rows[used // 2 : used]
            stop[span] = stop[rows[used - 1]]
    window = rng.choice([most, 3])
    start = np.maximum(stop - window, 0)
    q = rng.normal(size=(T, g.N, g.H))
    q[stop <= start] = np.nan
    pages = np.zeros((P, g.K, g.page_size, g.W))
    for part in split(pages, g.H):
        part[:] = rng.normal(size=part.shape)
    seen = np.zeros((P, g.page_size), bool)
    for row in range(T):
        for j in range(start[row], stop[row]):
            seen[tables[request[row], j // g.page_size], j % g.page_size] = True
    pages = np.where(seen[:, None, :, None], pages, np.nan)
    ints = (jnp.asarray(x, jnp.int32) for x in (tables, tile_request, start, stop))
    return Case(*(jnp.asarray(x, dtype) for x in (q, pages)), *ints)


def gathered(name, case: Case) -> np.ndarray:
    """Dense attention of each row on its request's keys, by the NumPy oracle."""
    g = GEOMETRIES[name]
    tables = np.asarray(case.block_tables)[request_of_row(g, case.tile_request)]
    rows = np.asarray(case.pages, np.float64)[tables].transpose(0, 1, 3, 2, 4)  # [T, M, page_size, K, W]
    k, v = split(rows.reshape(len(tables), -1, g.K, g.W), g.H)
    mask = mask_of(case.kv_start, case.kv_stop, k.shape[1])
    return dense_oracle(case.q[:, None], k, v, mask[:, None], g.H**-0.5, g.soft_cap)[:, 0]


@cache
def attend(form, name):
    """The form jitted, with the geometry's options."""
    g = GEOMETRIES[name]
    function = partial(xla.paged_attention, **g.options) if form == "xla" else reference.paged_attention
    return jax.jit(partial(function, decode_rows=g.decode_rows, scale=g.H**-0.5, soft_cap=g.soft_cap))


@pytest.mark.parametrize("form", ["xla", "reference"])
@given(name=names, seed=seeds)
@settings(max_examples=80, deadline=None)
def test_kernels_paged_equals_gathered_dense(form, name, seed):
    case = draw(name, seed)
    out = attend(form, name)(*case)
    chex.assert_trees_all_close(out, gathered(name, case).astype(np.float32), rtol=2e-5, atol=2e-5)
    assert not np.asarray(out)[np.asarray(case.kv_stop <= case.kv_start)].any()


@pytest.mark.parametrize("name", ["decode", "prefill", "mixed"])
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_kernels_paged_bfloat16(name, seed):
    case = draw(name, seed, jnp.bfloat16)
    out = attend("xla", name)(*case)
    chex.assert_type(out, jnp.bfloat16)
    expected = gathered(name, case)
    chex.assert_trees_all_close(np.asarray(out, np.float64), expected, rtol=4e-2, atol=4e-2)


@given(seed=seeds, tile_rows=st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_kernels_paged_tile_size_does_not_matter(seed, tile_rows):
    """The same rows in tiles of 4, of 2 and of 1."""
    case = draw("prefill", seed)
    finer = case._replace(tile_request=jnp.repeat(case.tile_request, 4 // tile_rows))
    chex.assert_trees_all_close(attend("xla", "prefill")(*finer), attend("xla", "prefill")(*case), rtol=2e-5, atol=2e-5)


def test_kernels_paged_decode_is_tiles_of_one_row():
    """The same rows as decode, as tiles of one row, and some as either."""
    case = draw("decode", 3)
    attends = [jax.jit(partial(paged_attention, decode_rows=n, implementation="xla")) for n in (6, 0, 2)]
    decode, *others = (attend(*case) for attend in attends)
    for out in others:
        chex.assert_trees_all_close(out, decode, rtol=1e-6, atol=1e-6)


def test_kernels_paged_default_is_xla():
    case = draw("decode, one block", 0)
    default, named = (
        jax.jit(partial(paged_attention, decode_rows=3, **options))
        for options in ({}, {"implementation": "xla", "scale": 5**-0.5})
    )
    chex.assert_trees_all_equal(default(*case), named(*case))


@pytest.mark.parametrize("decode_rows", [0, 32])
def test_kernels_paged_xla_makes_no_copy_of_the_cache(decode_rows):
    """Temporary memory stays what it is for the rows, however many pages there are."""

    def temporary(P):
        shapes = ((32, 4, 64), (P, 2, 16, 128)), ((8, 16), (2 if decode_rows == 0 else 32,), (32,), (32,))
        args = [
            jax.ShapeDtypeStruct(s, t) for t, group in zip(("float32", "int32"), shapes, strict=True) for s in group
        ]
        function = partial(paged_attention, decode_rows=decode_rows, implementation="xla")
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(64), temporary(4096)
    assert few == many
    assert many < 4096 * 2 * 16 * 128 * 4 / 10


BAD = {
    "rank": ({"q": (6, 2, 1, 8)}, {}, "expected q \\[T, N, H\\] and pages"),
    "pages": ({"pages": (9, 2, 16)}, {}, "expected q \\[T, N, H\\] and pages"),
    "no rows": ({"q": (0, 2, 8)}, {}, "no axis 0"),
    "head dimension": ({"q": (6, 2, 9)}, {}, "W = 16; a key and a value of 9 need W even and at least 18"),
    "odd width": ({"pages": (9, 2, 4, 17)}, {}, "W = 17; a key and a value of 8 need W even"),
    "heads": ({"q": (6, 3, 8)}, {}, "3 query heads can't share 2 key heads"),
    "tiles": ({"tile_request": (4,)}, {}, "4 tiles can't hold T = 6 rows"),
    "no tiles": ({"tile_request": (0,)}, {}, "0 tiles can't hold T = 6 rows"),
    "tables": ({"block_tables": (3,)}, {}, "expected block_tables \\[R, M\\]"),
    "empty tables": ({"block_tables": (3, 0)}, {}, "neither 0"),
    "intervals": ({"kv_stop": (3,)}, {}, "expected intervals \\[T = 6\\]"),
    "interval dtype": ({}, {"kv_start": jnp.float32}, "kv_start is int32, got float32"),
    "table dtype": ({}, {"block_tables": jnp.int8}, "block_tables is int32, got int8"),
    "integer pages": ({}, {"pages": jnp.int32}, "pages are bfloat16 or float16 or float32, got int32"),
    "two dtypes": ({}, {"pages": jnp.bfloat16}, "q and pages have one dtype, got float32 and bfloat16"),
}
GOOD = {"q": (6, 2, 8), "pages": (9, 2, 4, 16), "block_tables": (3, 3), "tile_request": (3,), "kv_start": (6,),
        "kv_stop": (6,)}  # fmt: skip


def zeros(shapes, dtypes):
    types = {"q": jnp.float32, "pages": jnp.float32} | dtypes
    return {name: jnp.zeros(shape, types.get(name, jnp.int32)) for name, shape in (GOOD | shapes).items()}


@pytest.mark.parametrize(("shapes", "dtypes", "message"), BAD.values(), ids=BAD)
def test_kernels_paged_errors_say_what_is_wrong(shapes, dtypes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**zeros(shapes, dtypes))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_kernels_paged_refuses_quantised_pages(dtype):
    with pytest.raises(NotImplementedError, match=f"pages of {dtype}: quantised pages are not built"):
        paged_attention(**zeros({}, {"pages": dtype}))


@pytest.mark.parametrize(
    ("tiles", "decode_rows", "message"),
    [
        (6, -1, "decode_rows = -1"),
        (6, 7, "6 tiles can't hold T = 6 rows: decode_rows = 7"),
        (6, 5, None),
        (5, 5, "decode_rows = 5 tiles of one row, and 0 of equally many for the 1 rows that are left"),
        (7, 6, "and 1 of equally many for the 0 rows"),
        (4, 2, None),
        (5, 2, "and 3 of equally many for the 4 rows"),
    ],
)
def test_kernels_paged_tiles_fit_rows(tiles, decode_rows, message):
    args = zeros({"tile_request": (tiles,)}, {})
    if message is None:
        assert not np.asarray(jax.jit(partial(paged_attention, decode_rows=decode_rows))(**args)).any()
        return
    with pytest.raises(ValueError, match=message):
        paged_attention(**args, decode_rows=decode_rows)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("block_tables", (1, 2), 9, "block_tables\\[1, 2\\] = 9 is outside pages 0 to 8"),
        ("block_tables", (0, 1), -1, "block_tables\\[0, 1\\] = -1 is outside pages 0 to 8"),
        ("tile_request", (2,), 3, "tile_request\\[2\\] = 3 is outside rows of block_tables 0 to 2"),
        ("kv_start", (4,), -2, "kv_start\\[4\\] = -2 is outside key positions 0 to 12"),
        ("kv_stop", (5,), 13, "kv_stop\\[5\\] = 13 is outside key positions 0 to 12"),
    ],
)
def test_kernels_paged_checks_values_that_are_known(name, index, value, message):
    args = zeros({}, {})
    args[name] = args[name].at[index].set(value)
    with pytest.raises(ValueError, match=message):
        paged_attention(**args)


def test_kernels_paged_check_of_block_tables_on_the_host():
    tables = np.array([[0, 8], [3, 0]], np.int32)
    check_block_tables(tables, 9)
    with pytest.raises(ValueError, match="block_tables\\[0, 1\\] = 8 is outside pages 0 to 7"):
        check_block_tables(tables, 8)
