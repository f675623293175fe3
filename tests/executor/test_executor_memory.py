"""Bytes of a page: what the arrays of a page really take on the platform."""

import jax.numpy as jnp
import pytest

from aphrodite_jax.executor.memory import kv_bytes_per_page
from kernels_pallas.pages import pages_shape

LAYERS = ((2, 64), (2, 64), (4, 80))  # (num_kv_heads, head_dim)


@pytest.mark.parametrize(("platform", "widths"), [("cpu", (128, 128, 160)), ("tpu", (128, 128, 256))])
def test_bytes_of_a_page_count_its_width(platform, widths):
    expected = 16 * 2 * sum(heads * width for (heads, _), width in zip(LAYERS, widths, strict=True))
    assert kv_bytes_per_page(LAYERS, 16, 2, platform) == expected
    ten = [jnp.zeros(pages_shape(10, heads, 16, dim, platform), jnp.bfloat16).nbytes for heads, dim in LAYERS]
    assert sum(ten) == 10 * expected
