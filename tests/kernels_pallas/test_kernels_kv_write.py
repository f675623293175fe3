"""Writing rows into pages: the right slots, in place, padding dropped."""

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
write = jax.jit(kv_write)


@given(seeds, st.sampled_from([jnp.float32, jnp.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_kernels_kv_write_equals_a_loop(seed, dtype):
    rng = np.random.default_rng(seed)
    pages = jnp.asarray(rng.normal(size=(P, PAGE_SIZE, K, H)), dtype)
    rows = jnp.asarray(rng.normal(size=(T, K, H)), jnp.float32)
    slots = rng.permutation(P * PAGE_SIZE)[:T].astype(np.int32)
    padding = rng.random(T) < 0.4
    slots[padding] = P * PAGE_SIZE + rng.integers(0, 2) * 7  # the same slot many times, as padding has
    expected = np.array(pages)
    for row, slot in zip(rows.astype(dtype), slots, strict=True):
        if slot < P * PAGE_SIZE:
            expected[slot // PAGE_SIZE, slot % PAGE_SIZE] = row
    out = write(pages, rows, jnp.asarray(slots))
    chex.assert_type(out, dtype)
    chex.assert_trees_all_equal(np.asarray(out), expected)


def test_kernels_kv_write_is_in_place_when_donated():
    pages = jnp.zeros((64, PAGE_SIZE, K, H))
    rows, slots = jnp.ones((T, K, H)), jnp.arange(T, dtype=jnp.int32)
    compiled = jax.jit(kv_write, donate_argnums=0).lower(pages, rows, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 4  # no second copy on the way
    address = pages.unsafe_buffer_pointer()
    out = compiled(pages, rows, slots)
    assert pages.is_deleted()
    assert out.unsafe_buffer_pointer() == address
    assert float(out.sum()) == rows.size


def test_kernels_kv_write_leaves_its_argument_alone_otherwise():
    pages = jnp.zeros((P, PAGE_SIZE, K, H))
    write(pages, jnp.ones((T, K, H)), jnp.arange(T, dtype=jnp.int32))
    assert not np.asarray(pages).any()


@pytest.mark.parametrize(
    ("pages", "rows", "slots", "dtype", "message"),
    [
        ((P, PAGE_SIZE, K), (T, K, H), (T,), jnp.int32, "expected pages \\[P, page_size, K, H\\]"),
        ((P, PAGE_SIZE, K, H), (T, K, H + 1), (T,), jnp.int32, "rows \\[T, K, H\\], got"),
        ((P, PAGE_SIZE, K, H), (T, K, H), (T + 1,), jnp.int32, "expected int32 slots \\[T = 9\\]"),
        ((P, PAGE_SIZE, K, H), (T, K, H), (T,), jnp.float32, "got float32"),
    ],
)
def test_kernels_kv_write_errors_say_what_is_wrong(pages, rows, slots, dtype, message):
    with pytest.raises(ValueError, match=message):
        kv_write(jnp.zeros(pages), jnp.zeros(rows), jnp.zeros(slots, dtype))
