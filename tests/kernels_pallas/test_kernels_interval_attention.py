"""Dense attention: the XLA form against the reference, the reference against NumPy, and what may not matter."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels_cases import EDGES, dense_oracle, draw_intervals, draw_qkv, mask_of, seeds

from kernels_pallas import interval_attention
from kernels_pallas.interval_attention import reference, xla
from kernels_pallas.interval_attention.differentiable import Call, attend

# B, T, S, N, K, H and options of the XLA form. Small tiles run the loops that real sizes run.
GEOMETRIES = {
    "one tile": ((2, 9, 9, 2, 2, 8), {}),
    "odd head": ((1, 7, 13, 3, 1, 5), {}),
    "rows alone are cut": ((2, 19, 6, 4, 2, 8), {"block_q": 4, "block_k": 8}),
    "keys alone are cut": ((2, 1, 30, 4, 4, 3), {"block_q": 8, "block_k": 7}),
    "both are cut": ((2, 21, 34, 6, 2, 8), {"block_q": 8, "block_k": 8}),
    "batch is cut": ((6, 10, 10, 2, 1, 4), {"block_q": 4, "block_k": 4, "tile_scores": 64}),
}
SOFT_CAP = {"odd head": 2.0, "both are cut": 3.0}
geometries = st.sampled_from(sorted(GEOMETRIES))
kinds = st.sampled_from(EDGES)


def case(name, kind, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    B, T, S, N, K, H = GEOMETRIES[name][0]
    qkv = draw_qkv(rng, B, T, S, N, K, H, dtype)
    d_out = jnp.asarray(rng.normal(size=(B, T, N, H)), dtype)
    return qkv, tuple(map(jnp.asarray, draw_intervals(rng, kind, B, T, S))), d_out


def attention(form, name):
    """A form with the options of a geometry and the scale that the public call takes by default."""
    (*_, H), options = GEOMETRIES[name]
    scale, soft_cap = H**-0.5, SOFT_CAP.get(name)
    if form == "reference":
        return lambda *operands: reference.interval_attention(*operands, scale=scale, soft_cap=soft_cap)[0]
    return partial(tiled, options, scale=scale, soft_cap=soft_cap)


def tiled(options, *operands, scale, soft_cap=None):
    """The XLA form with blocks of its own."""
    call = Call(partial(xla.forward, **options), partial(xla.backward, **options), scale, soft_cap, False)
    return attend(call, *operands)[0]


@cache
def run(form, name):
    """Jitted: ``(qkv, intervals, d_out)`` to the output and its gradients by q, k and v."""

    def both(qkv, intervals, d_out):
        out, pull = jax.vjp(lambda *qkv: attention(form, name)(*qkv, *intervals), *qkv)
        return out, pull(d_out)

    return jax.jit(both)


def close(a, b, tolerance=2e-5):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


@given(geometries, kinds, seeds)
@settings(max_examples=40, deadline=None)
def test_kernels_interval_reference_equals_numpy(name, kind, seed):
    (q, k, v), intervals, d_out = case(name, kind, seed)
    expected = dense_oracle(q, k, v, mask_of(*intervals, k.shape[1]), q.shape[-1] ** -0.5, SOFT_CAP.get(name))
    close(run("reference", name)((q, k, v), intervals, d_out)[0], expected.astype(np.float32))


@given(geometries, kinds, seeds)
@settings(max_examples=80, deadline=None)
def test_kernels_interval_xla_equals_reference(name, kind, seed):
    args = case(name, kind, seed)
    (out, by), (expected, expected_by) = (run(form, name)(*args) for form in ("xla", "reference"))
    close(out, expected)
    close(by, expected_by, 1e-4)


@given(
    st.tuples(*(st.integers(1, n) for n in (3, 40, 40, 2, 3, 12))), kinds, seeds,
    st.integers(1, 17), st.integers(1, 17),
)  # fmt: skip
@example((1, 33, 33, 2, 2, 4), "causal", 0, 32, 32)
@settings(max_examples=5, deadline=None)
def test_kernels_interval_any_shape_and_tile(shape, kind, seed, block_q, block_k):
    B, T, S, K, G, H = shape
    rng = np.random.default_rng(seed)
    qkv = draw_qkv(rng, B, T, S, K * G, K, H)
    start, stop = draw_intervals(rng, kind, B, T, S)
    out = jax.jit(partial(tiled, {"block_q": block_q, "block_k": block_k}, scale=0.5))(
        *qkv, jnp.asarray(start), jnp.asarray(stop)
    )
    close(out, dense_oracle(*qkv, mask_of(start, stop, S), 0.5).astype(np.float32))


@given(geometries, kinds, seeds)
@settings(max_examples=30, deadline=None)
def test_kernels_interval_empty_rows_give_zeros(name, kind, seed):
    qkv, (start, stop), d_out = case(name, kind, seed)
    start = start.at[:, ::2].set(stop[:, ::2])
    for form in ("xla", "reference"):
        out, by = run(form, name)(qkv, (start, stop), d_out)
        assert not np.asarray(out)[np.asarray(stop <= start)].any()
        assert not np.asarray(by[0])[np.asarray(stop <= start)].any()
        chex.assert_tree_all_finite((out, by))


@given(geometries, kinds, seeds)
@settings(max_examples=30, deadline=None)
def test_kernels_interval_unseen_slots_may_hold_nan(name, kind, seed):
    (q, k, v), (start, stop), d_out = case(name, kind, seed)
    hidden = np.random.default_rng(seed).random(k.shape[1]) < 0.3
    # Rows that would see a hidden slot see nothing, so that no row does.
    stop = jnp.where(jnp.asarray((mask_of(start, stop, k.shape[1]) & hidden).any(axis=-1)), start, stop)
    spoilt = [jnp.where(hidden[None, :, None, None], bad, x) for x, bad in ((k, jnp.nan), (v, jnp.inf))]
    for form in ("xla", "reference"):
        clean, dirty = (run(form, name)(qkv, (start, stop), d_out) for qkv in ((q, k, v), (q, *spoilt)))
        chex.assert_trees_all_equal(clean, dirty)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(jnp.bfloat16, "one tile"), (jnp.bfloat16, "both are cut"), (jnp.float16, "both are cut")],
)
@given(kind=kinds, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_kernels_interval_half_precision(dtype, name, kind, seed):
    args = case(name, kind, seed, dtype)
    out = run("xla", name)(*args)
    chex.assert_type(jax.tree.leaves(out), dtype)
    to_float32 = partial(jax.tree.map, lambda x: x.astype(jnp.float32) if x.dtype == dtype else x)
    close(to_float32(out), run("reference", name)(*to_float32(args)), 6e-2)


@pytest.mark.parametrize("name", ["one tile", "batch is cut"])
def test_kernels_interval_vmap_equals_loop(name):
    """Values and gradients of mapped sequences: intervals mapped, shared, and a gradient of two maps."""
    cases = [case(name, "random", seed) for seed in range(4)]
    qkv, intervals, d_out = stack(cases)
    one = run("xla", name)
    close(jax.jit(jax.vmap(one))(qkv, intervals, d_out), stack([one(*c) for c in cases]))
    shared = cases[0][1]
    expected = stack([one(qkv, shared, d_out)[1] for qkv, _, d_out in cases])
    pairs = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (qkv, d_out))
    mapped = jax.vmap(jax.vmap(lambda qkv: attention("xla", name)(*qkv, *shared)))
    by = jax.jit(jax.grad(lambda qkv, d_out: jnp.sum(mapped(qkv) * d_out)))(*pairs)
    close(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by), expected)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@pytest.mark.parametrize("program", ["forward", "gradient"])
def test_kernels_interval_memory_is_linear(program):
    """Temporary memory at T and 4 T: at most 4 times as much, and far below a T x S matrix of one head."""

    def temporary(T):
        q = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        bound = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def call(q, k, v, start, stop):
            return interval_attention(q, k, v, start, stop, implementation="xla")

        function = call if program == "forward" else jax.grad(lambda *args: call(*args).sum(), argnums=(0, 1, 2))
        return jax.jit(function).lower(q, q, q, bound, bound).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large <= 4.5 * small
    assert large < 8192 * 8192 * 4 / 8


@pytest.mark.parametrize("name", ["odd head", "both are cut"])
@pytest.mark.once
def test_kernels_interval_log_sums_join_disjoint_keys(name):
    """Attention over all keys is that over two halves, weighted by their log-sums; and log-sums have gradients."""
    qkv, (start, stop), _ = case(name, "random", 5)
    middle = jnp.full_like(start, qkv[1].shape[1] // 2)
    options = {"implementation": "xla", "return_lse": True, "soft_cap": 2.0}
    parts = [
        interval_attention(*qkv, jnp.minimum(start, middle), jnp.minimum(stop, middle), **options),
        interval_attention(*qkv, jnp.maximum(start, middle), jnp.maximum(stop, middle), **options),
    ]
    outs, log_sums = (jnp.stack(x) for x in zip(*parts, strict=True))
    total = jax.nn.logsumexp(log_sums, axis=0)
    share = jnp.where(jnp.isfinite(log_sums), jnp.exp(log_sums - total[None]), 0)
    out, lse = interval_attention(*qkv, start, stop, **options)
    close(jnp.sum(share[..., None] * outs, axis=0), out)
    chex.assert_trees_all_close(total, lse, rtol=1e-5)
    assert (np.isneginf(lse) == np.asarray(stop <= start)[..., None]).all()

    def weighed(implementation, *qkv):
        out, lse = interval_attention(*qkv, start, stop, **options | {"implementation": implementation})
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0))

    by, expected = (
        jax.grad(partial(weighed, implementation), argnums=(0, 1, 2))(*qkv) for implementation in ("xla", "reference")
    )
    close(by, expected, 1e-4)


def test_kernels_interval_default_is_xla():
    qkv, intervals, _ = case("odd head", "random", 0)
    default, named = (
        jax.jit(partial(interval_attention, **options)) for options in ({}, {"implementation": "xla", "scale": 5**-0.5})
    )
    chex.assert_trees_all_equal(*(function(*qkv, *intervals) for function in (default, named)))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_kernels_interval_nothing_to_attend(shape):
    B, T, S = shape
    bound = jnp.zeros((B, T), jnp.int32)
    out = interval_attention(jnp.ones((B, T, 2, 4)), jnp.ones((B, S, 2, 4)), jnp.ones((B, S, 2, 4)), bound, bound)
    chex.assert_trees_all_equal(out, jnp.zeros((B, T, 2, 4)))


BAD = {
    "rank": ({"q": (4, 2, 8)}, {}, "expected q \\[B, T, N, H\\]"),
    "k and v": ({"v": (1, 5, 2, 8)}, {}, "expected q .* k, v"),
    "batch": ({"q": (2, 4, 2, 8)}, {}, "differ in batch or head dimension"),
    "head dimension": ({"q": (1, 4, 2, 4)}, {}, "differ in batch or head dimension"),
    "heads": ({"q": (1, 4, 3, 8)}, {}, "3 query heads can't share 2 key heads"),
    "start": ({"kv_start": (4,)}, {}, "expected intervals \\[B, T\\]"),
    "stop": ({"kv_stop": (1, 6)}, {}, "expected intervals \\[B, T\\]"),
    "interval dtype": ({}, {"kv_start": jnp.float32}, "intervals are int32, got float32"),
    "integer values": ({}, {"v": jnp.int32}, "floating point, got float32, float32, int32"),
}


def test_kernels_interval_refuses_intervals_outside_the_keys():
    x, start = jnp.zeros((1, 3, 1, 4)), jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="sees keys \\[0, 4\\), outside \\[0, 3\\]"):
        interval_attention(x, x, x, start, jnp.asarray([[1, 4, 2]], jnp.int32))
    with pytest.raises(ValueError, match="interpret runs a Pallas kernel"):
        interval_attention(x, x, x, start, start, implementation="xla", interpret=True)


@pytest.mark.parametrize(("shapes", "dtypes", "message"), BAD.values(), ids=BAD)
def test_kernels_interval_errors_say_what_is_wrong(shapes, dtypes, message):
    good = {"q": (1, 4, 2, 8), "k": (1, 6, 2, 8), "v": (1, 6, 2, 8), "kv_start": (1, 4), "kv_stop": (1, 4)}
    args = {
        name: jnp.zeros(shape, dtypes.get(name, jnp.int32 if name.startswith("kv") else jnp.float32))
        for name, shape in (good | shapes).items()
    }
    with pytest.raises(ValueError, match=message):
        interval_attention(**args)
