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
from kernels_pallas.paged_attention import reference, xla


class Geometry(NamedTuple):
    """Requests, pages a request, page size, heads, and rows of a tile; tiles in all and the XLA form's options."""

    R: int
    M: int
    page_size: int
    N: int
    K: int
    H: int
    tile_rows: int
    tiles: int
    options: dict
    soft_cap: float | None = None


# Small blocks and groups run the loops that real sizes run.
GEOMETRIES = {
    "decode": Geometry(5, 7, 4, 4, 2, 8, 1, 6, {"block_tokens": 8}),
    "decode, one block": Geometry(3, 3, 5, 3, 1, 5, 1, 3, {}),
    "prefill": Geometry(3, 6, 4, 4, 2, 8, 4, 11, {"block_tokens": 8, "group_rows": 16}, 2.0),
    "prefill, tile by tile": Geometry(4, 5, 2, 2, 2, 4, 2, 9, {"block_tokens": 4, "group_rows": 1}),
    "prefill, one group": Geometry(2, 4, 3, 2, 1, 7, 3, 5, {}),
}
names = st.sampled_from(sorted(GEOMETRIES))


class Case(NamedTuple):
    """Arguments of the call."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    block_tables: jax.Array
    tile_request: jax.Array
    kv_start: jax.Array
    kv_stop: jax.Array


def draw(name, seed, dtype=jnp.float32) -> Case:
    """Requests of random lengths whose last rows are computed: ragged tiles, pages in random order.

    NaN fills every slot that no row sees, and every page that no request has.
    """
    g, rng = GEOMETRIES[name], np.random.default_rng(seed)
    most = g.M * g.page_size
    P = g.R * g.M + 2
    tables = rng.permutation(P)[: g.R * g.M].reshape(g.R, g.M)
    tile_request = rng.integers(0, g.R, g.tiles)
    if rng.random() < 0.7:
        tile_request = np.sort(tile_request)  # as the engine lays them out
    T = g.tiles * g.tile_rows
    stop = np.zeros(T, np.int64)
    for r in range(g.R):
        rows = np.flatnonzero(np.repeat(tile_request, g.tile_rows) == r)
        used = min(len(rows), rng.integers(0, most + 1))  # rows past these pad the request's last tiles
        length = rng.integers(used, most + 1)
        stop[rows[:used]] = np.arange(length - used, length) + 1
        if g.tile_rows > 1 and used and rng.random() < 0.5:  # a span whose rows see each other
            span = rows[used // 2 : used]
            stop[span] = stop[rows[used - 1]]
    window = rng.choice([most, 3])
    start = np.maximum(stop - window, 0)
    q = rng.normal(size=(T, g.N, g.H))
    k, v = rng.normal(size=(2, P, g.page_size, g.K, g.H))
    seen = np.zeros((P, g.page_size), bool)
    for row, request in enumerate(np.repeat(tile_request, g.tile_rows)):
        for j in range(start[row], stop[row]):
            seen[tables[request, j // g.page_size], j % g.page_size] = True
    k[~seen], v[~seen] = np.nan, np.nan
    ints = (jnp.asarray(x, jnp.int32) for x in (tables, tile_request, start, stop))
    return Case(*(jnp.asarray(x, dtype) for x in (q, k, v)), *ints)


def gathered(case: Case, soft_cap=None) -> np.ndarray:
    """Dense attention of each row on its request's keys, by the NumPy oracle."""
    tables = np.asarray(case.block_tables)[np.repeat(case.tile_request, len(case.q) // len(case.tile_request))]
    k, v = (
        np.asarray(x, np.float64)[tables].reshape(len(tables), -1, *x.shape[2:]) for x in (case.k_pages, case.v_pages)
    )
    mask = mask_of(case.kv_start, case.kv_stop, k.shape[1])
    return dense_oracle(case.q[:, None], k, v, mask[:, None], case.q.shape[-1] ** -0.5, soft_cap)[:, 0]


@cache
def attend(form, name):
    """The form jitted, with the geometry's options."""
    g = GEOMETRIES[name]
    function = partial(xla.paged_attention, **g.options) if form == "xla" else reference.paged_attention
    return jax.jit(partial(function, scale=g.H**-0.5, soft_cap=g.soft_cap))


@pytest.mark.parametrize("form", ["xla", "reference"])
@given(name=names, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_kernels_paged_equals_gathered_dense(form, name, seed):
    case = draw(name, seed)
    out = attend(form, name)(*case)
    chex.assert_trees_all_close(out, gathered(case, GEOMETRIES[name].soft_cap).astype(np.float32), rtol=2e-5, atol=2e-5)
    assert not np.asarray(out)[np.asarray(case.kv_stop <= case.kv_start)].any()


@pytest.mark.parametrize("name", ["decode", "prefill"])
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_kernels_paged_bfloat16(name, seed):
    case = draw(name, seed, jnp.bfloat16)
    out = attend("xla", name)(*case)
    chex.assert_type(out, jnp.bfloat16)
    expected = gathered(case, GEOMETRIES[name].soft_cap)
    chex.assert_trees_all_close(np.asarray(out, np.float64), expected, rtol=4e-2, atol=4e-2)


@given(seed=seeds, tile_rows=st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_kernels_paged_tile_size_does_not_matter(seed, tile_rows):
    """The same rows in tiles of 4, of 2 and of 1."""
    case = draw("prefill", seed)
    finer = case._replace(tile_request=jnp.repeat(case.tile_request, 4 // tile_rows))
    chex.assert_trees_all_close(attend("xla", "prefill")(*finer), attend("xla", "prefill")(*case), rtol=2e-5, atol=2e-5)


def test_kernels_paged_default_is_xla():
    case = draw("decode, one block", 0)
    default, named = (
        jax.jit(partial(paged_attention, **options)) for options in ({}, {"implementation": "xla", "scale": 5**-0.5})
    )
    chex.assert_trees_all_equal(default(*case), named(*case))


BAD = {
    "rank": ({"q": (6, 2, 1, 8)}, {}, "expected q \\[T, N, H\\] and pages"),
    "pages": ({"v_pages": (9, 4, 1, 8)}, {}, "expected q \\[T, N, H\\] and pages"),
    "head dimension": ({"q": (6, 2, 4)}, {}, "expected q \\[T, N, H\\] and pages"),
    "heads": ({"q": (6, 3, 8)}, {}, "3 query heads can't share 2 key heads"),
    "tiles": ({"tile_request": (4,)}, {}, "G dividing T = 6"),
    "no tiles": ({"tile_request": (0,)}, {}, "G dividing T = 6"),
    "tables": ({"block_tables": (3,)}, {}, "expected block_tables \\[R, M\\]"),
    "intervals": ({"kv_stop": (3,)}, {}, "expected intervals \\[T = 6\\]"),
    "interval dtype": ({}, {"kv_start": jnp.float32}, "kv_start is int32, got float32"),
    "table dtype": ({}, {"block_tables": jnp.int8}, "block_tables is int32, got int8"),
    "integer pages": ({}, {"k_pages": jnp.int32}, "floating point, got float32, int32, float32"),
}


@pytest.mark.parametrize(("shapes", "dtypes", "message"), BAD.values(), ids=BAD)
def test_kernels_paged_errors_say_what_is_wrong(shapes, dtypes, message):
    good = {"q": (6, 2, 8), "k_pages": (9, 4, 2, 8), "v_pages": (9, 4, 2, 8), "block_tables": (3, 3),
            "tile_request": (3,), "kv_start": (6,), "kv_stop": (6,)}  # fmt: skip
    floats = ("q", "k_pages", "v_pages")
    args = {
        name: jnp.zeros(shape, dtypes.get(name, jnp.float32 if name in floats else jnp.int32))
        for name, shape in (good | shapes).items()
    }
    with pytest.raises(ValueError, match=message):
        paged_attention(**args)
