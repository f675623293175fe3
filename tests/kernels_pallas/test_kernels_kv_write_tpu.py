"""TPU's kernel that writes to pages, in interpret mode, against a loop in NumPy."""

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
from kernels_pallas.kv_write import pallas_tpu
from kernels_pallas.kv_write.pallas_tpu import kv_write
from kernels_pallas.pages import page_width

P = 6
write = jax.jit(kv_write, static_argnames="interpret")


def check(slots, *, K=2, H=64, page_size=16, dtype="float32", interpret=True, seed=0, write=write):
    """Rows at ``slots`` of NaN pages; every other bit of the pages stays what it was."""
    rng = np.random.default_rng(seed)
    slots, W = np.asarray(slots, np.int32), page_width(H, "tpu")
    pages = np.where(rng.random((P, K, page_size, W)) < 0.1, np.nan, rng.normal(size=(P, K, page_size, W)))
    pages = jnp.asarray(pages.astype(np.float32), dtype)
    k, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, len(slots), K, H)).astype(np.float32))
    expected = np.array(pages.astype(jnp.float32))
    cast_k, cast_v = (np.asarray(x.astype(dtype).astype(jnp.float32)) for x in (k, v))
    for t, slot in enumerate(slots):
        if slot < P * page_size:
            row = np.zeros((K, W), np.float32)
            row[:, :H], row[:, W // 2 : W // 2 + H] = cast_k[t], cast_v[t]
            expected[slot // page_size, :, slot % page_size] = row
    out = write(pages, k, v, jnp.asarray(slots), interpret=interpret)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "slots",
    [
        [5, 40, 95, 23],
        range(11, 62),
        [*range(30, 34), *range(3, 9), 95, 29, 9],
        [33, 96, 32, 2000, 96, 2**31 - 1, 0],
        [96] * 5,
    ],
    ids=["decode", "prefill", "mixed", "padding", "padding-only"],
)
def test_kernels_kv_write_tpu_writes_rows(slots, dtype):
    check(list(slots), dtype=dtype)


@pytest.mark.parametrize(
    ("K", "H", "page_size", "dtype"),
    [(1, 8, 8, "float32"), (5, 72, 32, "bfloat16"), (6, 256, 16, "bfloat16"), (12, 128, 16, "float32")],
)
def test_kernels_kv_write_tpu_shapes(K, H, page_size, dtype):
    check([1, page_size * 3 + 7, 0, page_size - 1, page_size * P], K=K, H=H, page_size=page_size, dtype=dtype)


def test_kernels_kv_write_tpu_no_rows():
    pages, rows = jnp.ones((2, 1, 8, 128)), jnp.zeros((0, 1, 64))
    out = kv_write(pages, rows, rows, jnp.zeros(0, jnp.int32), interpret=True)
    np.testing.assert_array_equal(out, pages)


def test_kernels_kv_write_tpu_many_rows_take_several_calls(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "SLOTS", 5)
    check([0, 9, 3, 40, 1, 4, 96, 8, 41, 39, 2], write=kv_write)


@given(st.integers(0, 2**32 - 1), st.sampled_from([9, 96]), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=20, deadline=None)
def test_kernels_kv_write_tpu_random(seed, rows, dtype):
    rng = np.random.default_rng(seed)
    slots = rng.permutation(P * 16)[:rows]
    check(np.where(rng.random(rows) < 0.2, P * 16 + rng.integers(0, 9, rows), slots), dtype=dtype, seed=seed)


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize(
    "slots", [[*range(5, 50), 0, 96, 60, 95, 96], list(range(0, 96, 7)), [3]], ids=["prefill", "decode", "one"]
)
def test_kernels_kv_write_tpu_copies_do_not_race(slots, mode, monkeypatch, capsys):
    monkeypatch.setattr(pallas_tpu, "BUFFERS", 3)  # so that buffers are used again
    params = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True)
    check(slots, page_size=16, dtype="float32", interpret=params)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "page_size", "W", "message"),
    [
        ("bfloat16", 8, 256, "page sizes of bfloat16 on TPU are multiples of 16, got 8"),
        ("float32", 4, 256, "page sizes of float32 on TPU are multiples of 8, got 4"),
        ("float32", 16, 160, "W a multiple of 128, got 160"),
        ("float16", 16, 256, "bfloat16 or float32, got float16"),
        ("int8", 32, 256, "bfloat16 or float32, got int8"),
    ],
)
def test_kernels_kv_write_tpu_says_what_it_cannot_do(dtype, page_size, W, message):
    rows = jnp.zeros((1, 2, 64))
    with pytest.raises(NotImplementedError, match=message):
        kv_write(jnp.zeros((3, 2, page_size, W), dtype), rows, rows, jnp.zeros(1, jnp.int32), interpret=True)


def build(K, H, page_size, T=64, pages=512):
    """What the compiler is given: rows of decode."""
    shapes = (pages, K, page_size, page_width(H, "tpu")), (T, K, H), (T, K, H)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return kv_write, [*arguments, jax.ShapeDtypeStruct((T,), jnp.int32)], {"donate": (0,)}


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "sizes"), [("v4", dict(K=32, H=128, page_size=16)), ("v5e", dict(K=5, H=64, page_size=64))]
)
def test_kernels_kv_write_tpu_compiles_in_place(chip, sizes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = tpu.run(chip, f"{Path(__file__).stem}:build", sizes, cycles=False)
    assert "error" not in found
    page_bytes = 512 * sizes["K"] * sizes["page_size"] * page_width(sizes["H"], "tpu") * 2
    assert found["temp_bytes"] < page_bytes / 10
