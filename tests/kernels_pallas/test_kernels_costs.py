"""What the compiler is told of a kernel's work, and where it leaves the pages."""

import re

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import needs_libtpu

from kernels_pallas import costs
from kernels_pallas.pages import pages_shape
from kernels_pallas.platform import made_for

T, N, K, H = 16, 8, 1, 128
PAGES, TABLE, PAGE_SIZE = 4096, 256, 16


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def pages(num_pages=PAGES):
    return shape(*pages_shape(num_pages, K, PAGE_SIZE, H, "tpu"))


def test_costs_of_decode_rows_that_fill_their_tables_or_the_cache():
    q = shape(T, N, H)
    row = 2 * H * 2  # bytes of a key and a value
    keys = TABLE * PAGE_SIZE
    full = costs.paged_decode(q, pages(), TABLE)
    assert full.bytes_accessed == T * keys * row + 2 * T * N * H * 2
    assert (full.flops, full.transcendentals) == (4 * T * N * keys * H, T * N * keys)
    half = costs.paged_decode(q, pages(PAGES // 2), TABLE)
    assert half.flops == full.flops // 2
    assert costs.paged_decode(q, pages(), TABLE, 100) == costs.paged_decode(q, pages(), TABLE, keys=100)
    assert costs.paged_decode(q, pages(), TABLE, 100).flops == 4 * T * N * 100 * H


def test_costs_of_prompts_that_see_half_of_their_tables_on_average():
    q = shape(64, N, H)
    cost = costs.paged_prefill(q, pages(), 2, TABLE)
    keys = TABLE * PAGE_SIZE
    assert cost.flops == 4 * 64 * N * (keys // 2) * H
    assert cost.bytes_accessed == 2 * keys * 2 * H * 2 + 2 * 64 * N * H * 2
    assert costs.paged_prefill(q, pages(), 2, TABLE, 50).flops == 4 * 64 * N * 50 * H


def test_costs_of_dense_attention_and_of_writing():
    dense = costs.dense_attention(shape(2, 8, 4, 64), shape(2, 16, 2, 64))
    assert dense.flops == 4 * 2 * 4 * 8 * 16 * 64
    assert dense.bytes_accessed == 2 * 2 * (2 * 8 * 4 * 64 + 2 * 16 * 2 * 64)
    assert costs.kv_write(pages(), 5).bytes_accessed == 5 * 2 * H * (4 + 2 + 2)


@needs_libtpu
@pytest.mark.once
def test_costs_are_what_the_compiler_counts_and_pages_stay_where_they_are():
    """Two layers over caches that would fit in VMEM: XLA would copy them there and back around each step."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kernels_pallas import kv_write, paged_attention
    from kernels_pallas.compile_only.tpu import topology_devices

    device = topology_devices("v5e:1x1")[0]

    def step(caches, weights, x, slots, tables, request, start, stop):
        new = []
        for cache, weight in zip(caches, weights, strict=True):
            x = jnp.tanh(x @ weight)
            k = x[:, : K * H].reshape(T, K, H)
            cache = kv_write(cache, k, k, slots)
            q = x.reshape(T, N, H)
            out = paged_attention(q, cache, tables, request, start, stop, decode_rows=T)
            x = out.reshape(T, N * H)
            new.append(cache)
        return new, x

    row = shape(T, dtype=jnp.int32)
    args = (
        [pages()] * 4, [shape(N * H, N * H)] * 4, shape(T, N * H), row, shape(T, TABLE, dtype=jnp.int32), row, row, row,
    )  # fmt: skip
    mesh = Mesh([device], ("x",))
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), args
    )
    with jax.set_mesh(mesh), made_for(device):
        compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    shapes = ",".join(map(str, pages().shape))
    assert not re.findall(rf"bf16\[{shapes}\][^ ]*S\(1\)", compiled.as_text())
    told = 4 * costs.paged_decode(shape(T, N, H), pages(), TABLE).bytes_accessed
    counted = compiled.cost_analysis()["bytes accessed"]
    assert told < counted < 1.5 * told  # all pages as operands and results would be three times as much
