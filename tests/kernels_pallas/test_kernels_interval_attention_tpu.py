"""The TPU's dense forward kernel, as plain JAX on the CPU, against the reference; and compiled for real chips."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from kernels_cases import EDGES, draw_intervals, draw_qkv, seeds
from tpu_compiler import needs_libtpu

from kernels_pallas import block_sizes, interval_attention, intervals, tune
from kernels_pallas.compile_only import tpu
from kernels_pallas.interval_attention import pallas_tpu, reference
from kernels_pallas.tpu_tiles import Blocks

ACROSS = Blocks(True, 128, 2, 128, 128, 128, heads=2, step=128, resident=256)
DOWN = Blocks(False, 256, 1, 256, 128, 128, heads=4, step=128, resident=256)
CUT = {"across": ACROSS, "down": DOWN, "table": None}
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("cut", "soft_cap"), compiler_options=COMPILE_FAST)
def kernel(q, k, v, start, stop, *, cut, soft_cap=None):
    scale = q.shape[-1] ** -0.5
    return pallas_tpu.forward(q, k, v, start, stop, scale=scale, soft_cap=soft_cap, interpret=True, blocks=CUT[cut])


@functools.partial(jax.jit, static_argnames=("soft_cap",), compiler_options=COMPILE_FAST)
def oracle(q, k, v, start, stop, *, soft_cap=None):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return reference.interval_attention(q, k, v, start, stop, scale=q.shape[-1] ** -0.5, soft_cap=soft_cap)


def check(qkv, start, stop, cut, *, soft_cap=None, tolerance=1e-5):
    """The kernel on operands with NaN wherever nothing looks, against the reference on clean ones."""
    q, k, v = qkv
    keys = np.arange(k.shape[1])
    seen = ((start[..., None] <= keys) & (keys < stop[..., None])).any(axis=1)
    spoilt = [jnp.where(jnp.asarray(seen)[..., None, None], x, jnp.nan) for x in (k, v)]
    padding = jnp.where(jnp.asarray(stop > start)[..., None, None], q, jnp.nan)
    out, lse = kernel(padding, *spoilt, start, stop, cut=cut, soft_cap=soft_cap)
    expected, expected_lse = oracle(q, k, v, start, stop, soft_cap=soft_cap)
    assert out.dtype == q.dtype
    chex.assert_trees_all_close(out.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_close(lse, expected_lse, rtol=tolerance, atol=tolerance)
    assert not np.asarray(out, np.float32)[stop <= start].any()


def of(mask: intervals.RowIntervals, batch=1):
    return tuple(np.ascontiguousarray(np.broadcast_to(x, (batch, len(x))), np.int32) for x in mask)


def of_first(mask: intervals.RowIntervals):
    """Of the first of two sequences; the other's rows see nothing."""
    return tuple(x * np.array([[1], [0]], np.int32) for x in of(mask, 2))


# B, T, S, N, K, H, how it is cut, and the mask
CASES = {
    "causal": ((1, 300, 300, 4, 1, 128), "down", lambda: of(intervals.causal(300))),
    "window": ((1, 520, 520, 2, 2, 128), "down", lambda: of(intervals.causal(520, window=130))),
    "spans of one token and side by side": (
        (1, 300, 300, 4, 2, 256),
        "down",
        lambda: of(intervals.bidirectional_spans(intervals.causal(300), [(3, 4), (10, 200), (200, 260)])),
    ),
    "span longer than the window": (
        (1, 300, 300, 2, 1, 128),
        "across",
        lambda: of(intervals.bidirectional_spans(intervals.causal(300, window=40), [(50, 250)])),
    ),
    "packed with a gap": (
        (1, 400, 400, 2, 1, 72),
        "across",
        lambda: of(intervals.packed(intervals.causal(400), [(0, 100), (130, 400)])),
    ),
    "tower": ((2, 577, 577, 3, 3, 64), "table", lambda: of(intervals.full(577), 2)),
    "tower of 80": ((1, 300, 300, 4, 4, 80), "across", lambda: of(intervals.full(300))),
    "prefix": ((1, 260, 260, 6, 1, 96), "across", lambda: of(intervals.prefix(intervals.causal(260), 150))),
    "five heads": ((1, 140, 140, 5, 5, 128), "table", lambda: of(intervals.causal(140))),
    "six key heads": ((1, 140, 900, 12, 6, 64), "table", lambda: of(intervals.causal(140, offset=760))),
    "many keys of few rows": ((1, 3, 1000, 2, 1, 128), "table", lambda: of(intervals.causal(3, offset=900))),
    "32 heads of 8": ((1, 130, 70, 32, 32, 8), "table", lambda: of(intervals.causal(130, offset=-60))),
    "a sequence that sees nothing": ((2, 200, 150, 4, 2, 64), "table", lambda: of_first(intervals.causal(200))),
    "the same, heads in lanes": ((2, 200, 300, 2, 1, 128), "table", lambda: of_first(intervals.causal(200, window=9))),
    "one row": ((1, 1, 1, 1, 1, 128), "table", lambda: of(intervals.full(1))),
}


def cut_case(name):
    shape, cut, mask = CASES[name]
    start, stop = mask()
    return shape, cut, np.clip(start, 0, shape[2]), np.clip(stop, 0, shape[2])


@pytest.mark.parametrize("name", CASES)
def test_kernels_tpu_forward_equals_reference(name):
    shape, cut, start, stop = cut_case(name)
    check(draw_qkv(np.random.default_rng(0), *shape), start, stop, cut)


@pytest.mark.parametrize(("name", "soft_cap"), [("causal", None), ("tower", None), ("packed with a gap", 3.0)])
def test_kernels_tpu_forward_half_precision(name, soft_cap):
    shape, cut, start, stop = cut_case(name)
    qkv = draw_qkv(np.random.default_rng(1), *shape, jnp.bfloat16)
    check(qkv, start, stop, cut, soft_cap=soft_cap, tolerance=2e-2)


@pytest.mark.parametrize("kind", EDGES)
@given(seed=seeds)
@settings(max_examples=6, deadline=None)
def test_kernels_tpu_forward_random_masks(kind, seed):
    rng = np.random.default_rng(seed)
    cut, H = (("down", 128), ("across", 72))[seed % 2]
    start, stop = draw_intervals(rng, kind, 2, 290, 410)
    check(draw_qkv(rng, 2, 290, 410, 4, 2, H), start, stop, cut, soft_cap=4.0)


@pytest.mark.once
def test_kernels_tpu_gradients_through_the_public_call():
    """Forward and backward kernels together, log-sums too."""
    rng = np.random.default_rng(2)
    qkv = draw_qkv(rng, 1, 150, 150, 4, 2, 64)
    start, stop = map(jnp.asarray, draw_intervals(rng, "random", 1, 150, 150))
    d_out, d_lse = jnp.asarray(rng.normal(size=(1, 150, 4, 64)), jnp.float32), jnp.float32(0.3)

    def total(implementation, interpret, q, k, v):
        options = {"implementation": implementation, "interpret": interpret, "return_lse": True}
        out, lse = interval_attention(q, k, v, start, stop, **options)
        return jnp.sum(out * d_out) + d_lse * jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    ours = jax.jit(jax.grad(functools.partial(total, "pallas_tpu", True), argnums=(0, 1, 2)))(*qkv)
    expected = jax.grad(functools.partial(total, "reference", False), argnums=(0, 1, 2))(*qkv)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", ["across", "down"])
def test_kernels_tpu_forward_reads_nothing_that_was_not_written(cut):
    """With memory that is NaN until it is written, and races looked for."""
    rng = np.random.default_rng(4)
    T, S, H = 270, 500, 128
    start, stop = draw_intervals(rng, "random", 1, T, S)
    q, k, v = draw_qkv(rng, 1, T, S, 2, 1, H)
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    options = {"scale": H**-0.5, "soft_cap": None, "interpret": params, "blocks": CUT[cut]}
    out, lse = jax.jit(functools.partial(pallas_tpu.forward, **options))(q, k, v, start, stop)
    expected = oracle(q, k, v, start, stop)
    chex.assert_trees_all_close((out, lse), expected, rtol=1e-5, atol=1e-5)


def test_kernels_tpu_free_blocks_are_seen_by_every_row():
    """The bounds: hulls hold what is seen, and free blocks nothing that a row does not see."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        start, stop = draw_intervals(rng, rng.choice(EDGES), 1, 512, 700)
        first, last, free_first, free_last = pallas_tpu.edges(start, stop, 700, ACROSS, np)
        keys = np.arange(768)
        seen = (start[0, :, None] <= keys) & (keys < stop[0, :, None])
        for piece, rows in enumerate(seen.reshape(4, 128, 768)):
            outside = (keys // 128 < first[piece]) | (keys // 128 >= last[piece])
            assert not rows[:, outside].any()
        for program, rows in enumerate(seen.reshape(2, 256, 768)):
            free = (keys // 128 >= free_first[program]) & (keys // 128 < free_last[program])
            assert rows[:, free].all()


def test_kernels_tpu_few_programs_own_half_as_many_heads():
    """A tower of 16 heads: one picture makes four programs of four heads, two make as many of eight."""
    for batch, heads in ((1, 4), (2, 8), (8, 8)):
        blocks = block_sizes.blocks_for("v6e", 577, 577, batch * 16, 1, 64, 2, 96 << 20)
        assert (blocks.heads, blocks.keys, blocks.step) == (heads, 592, 256)


def test_kernels_tpu_table_has_every_kind():
    table = json.loads(block_sizes.TABLE.read_text())
    assert set(table["blocks"]) == set(block_sizes.CHIPS.values())
    for chip, kinds in table["blocks"].items():
        assert set(kinds) == set(tune.PROBLEMS)
        for kind, entry in kinds.items():
            blocks = Blocks(**entry)
            assert blocks.rows % blocks.edge_rows == blocks.keys % blocks.edge_keys == 0, (chip, kind)
            assert blocks.edge_keys % blocks.step == blocks.resident % blocks.edge_keys == 0, (chip, kind)
            assert blocks.across or not kind.startswith("narrow")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_kernels_tpu_refuses_what_it_cannot_do(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, bound = jnp.zeros((1, 8, 1, 128), dtype), jnp.zeros((1, 8), jnp.int32)
        with pytest.raises(NotImplementedError, match="bfloat16 or float32; got float"):
            interval_attention(x, x, x, bound, bound, implementation="pallas_tpu", interpret=True)


MODELS = {
    "Llama": (1, 4096, 32, 8, 128),
    "Gemma 3": (1, 4096, 8, 4, 256),
    "Qwen2.5-VL": (1, 2040, 16, 16, 80),
    "CLIP-L": (8, 577, 16, 16, 64),
    "SigLIP": (4, 729, 16, 16, 72),
}


def attention(B, T, N, K, H, dtype="bfloat16"):
    """What to compile, and its arguments."""
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    bound = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return functools.partial(interval_attention, implementation="pallas_tpu"), [*arrays, bound, bound]


@needs_libtpu
@pytest.mark.parametrize(
    ("model", "chip"), [*((model, "v5e") for model in MODELS), ("SigLIP", "v6e"), ("Gemma 3", "tpu7x")]
)
def test_kernels_tpu_forward_compiles(model, chip):
    """For the head shapes of published models; temporary memory stays in the order of the operands.

    `kernels_pallas.bench` compiles all of them for every chip.
    """
    shape = MODELS[model]
    compiled = tpu.compile_for(chip, *attention(*shape))
    B, T, N, _, H = shape
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * B * T * N * max(H, 128) * 2


@needs_libtpu
@pytest.mark.once
def test_kernels_tpu_memory_is_linear():
    def temporary(T):
        compiled = tpu.compile_for("v5e", *attention(1, T, 8, 2, 128))
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(16384), temporary(65536)
    assert large < 4.5 * small
    assert large < 65536 * 65536 / 8, "a row by key mask, in bits"


@needs_libtpu
def test_kernels_tpu_compiles_under_a_mesh():
    """Heads over four chips by `shard_map`."""
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    function, args = attention(1, 1024, 32, 8, 128)
    mesh = Mesh(np.array(tpu.devices("v5e-4")), ("heads",))
    heads = P(None, None, "heads")
    specs = (heads, heads, heads, P(), P())
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
        args = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x, spec in zip(args, specs, strict=True)
        ]
        text = jax.jit(sharded).lower(*args).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text
