"""Writing rows into pages: the right slots, in place, padding dropped."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import seeds

from kernels_pallas import kv_write

P, PAGE_SIZE, K, H, T = 5, 4, 2, 3, 9
WRITES = {name: jax.jit(partial(kv_write, implementation=name)) for name in ("reference", "xla")}


@pytest.mark.parametrize("name", WRITES)
@given(seed=seeds, dtype=st.sampled_from([jnp.float32, jnp.bfloat16]), width=st.sampled_from([2 * H, 10]))
@settings(max_examples=40, deadline=None)
def test_kernels_kv_write_equals_a_loop(name, seed, dtype, width):
    rng = np.random.default_rng(seed)
    pages = jnp.asarray(rng.normal(size=(P, K, PAGE_SIZE, width)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(T, K, H)), jnp.float32) for _ in range(2))
    slots = rng.permutation(P * PAGE_SIZE)[:T].astype(np.int32)
    padding = rng.random(T) < 0.4
    slots[padding] = P * PAGE_SIZE + rng.integers(0, 2) * 7  # the same slot many times, as padding has
    expected = np.array(pages)
    for key, value, slot in zip(k.astype(dtype), v.astype(dtype), slots, strict=True):
        if slot < P * PAGE_SIZE:
            row = expected[slot // PAGE_SIZE, :, slot % PAGE_SIZE]
            row[:] = 0
            row[:, :H], row[:, width // 2 : width // 2 + H] = key, value
    out = WRITES[name](pages, k, v, jnp.asarray(slots))
    chex.assert_type(out, dtype)
    chex.assert_trees_all_equal(np.asarray(out), expected)


def test_kernels_kv_write_is_in_place_when_donated():
    pages = jnp.zeros((64, K, PAGE_SIZE, 2 * H))
    k, v, slots = jnp.ones((T, K, H)), jnp.full((T, K, H), 2.0), jnp.arange(T, dtype=jnp.int32)
    compiled = jax.jit(partial(kv_write, implementation="xla"), donate_argnums=0).lower(pages, k, v, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 4  # no second copy on the way
    address = pages.unsafe_buffer_pointer()
    out = compiled(pages, k, v, slots)
    assert pages.is_deleted()
    assert out.unsafe_buffer_pointer() == address
    assert float(out.sum()) == 3 * k.size


def test_kernels_kv_write_leaves_its_argument_alone_otherwise():
    pages = jnp.zeros((P, K, PAGE_SIZE, 2 * H))
    rows = jnp.ones((T, K, H))
    WRITES["xla"](pages, rows, rows, jnp.arange(T, dtype=jnp.int32))
    assert not np.asarray(pages).any()


GOOD = {"pages": (P, K, PAGE_SIZE, 2 * H), "k": (T, K, H), "v": (T, K, H), "slots": (T,)}


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        ({"pages": (P, K, PAGE_SIZE)}, {}, "expected pages \\[P, K, page_size, W\\]"),
        ({"v": (T, K, H + 1)}, {}, "k, v \\[T, K, H\\], got"),
        ({"k": (T, K + 1, H), "v": (T, K + 1, H)}, {}, "k, v \\[T, K, H\\], got"),
        ({"pages": (P, K, PAGE_SIZE, 2 * H - 1)}, {}, "a value of 3 need W even and at least 6"),
        ({"slots": (T + 1,)}, {}, "expected int32 slots \\[T = 9\\]"),
        ({}, {"slots": jnp.float32}, "got float32"),
        ({}, {"pages": jnp.int32}, "pages are bfloat16 or float16 or float32, got int32"),
        ({}, {"v": jnp.int32}, "k and v are floating point, got float32 and int32"),
    ],
)
def test_kernels_kv_write_errors_say_what_is_wrong(shapes, dtypes, message):
    default = {"slots": jnp.int32} | dtypes
    args = {name: jnp.zeros(shape, default.get(name, jnp.float32)) for name, shape in (GOOD | shapes).items()}
    with pytest.raises(ValueError, match=message):
        kv_write(**args)


def test_kernels_kv_write_refuses_quantised_pages():
    args = {name: jnp.zeros(shape, jnp.int8) for name, shape in GOOD.items()}
    with pytest.raises(NotImplementedError, match="pages of int8"):
        kv_write(**args)


@pytest.mark.parametrize(
    ("slots", "message"),
    [([0, -1, 2], "slots are not negative, got slots\\[1\\] = -1"), ([7, 20, 7], "are distinct, got 7 more than once")],
)
def test_kernels_kv_write_checks_slots_that_are_known(slots, message):
    pages, rows = jnp.zeros((P, K, PAGE_SIZE, 2 * H)), jnp.ones((3, K, H))
    with pytest.raises(ValueError, match=message):
        kv_write(pages, rows, rows, jnp.asarray(slots, jnp.int32))
    kv_write(pages, rows, rows, jnp.asarray([20, 20, 21], jnp.int32))  # padding, as often as one likes
