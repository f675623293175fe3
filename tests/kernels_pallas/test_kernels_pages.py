"""The page layout: its width by platform, rows joined and split, pages that can't hold the heads refused."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.pages import check_pages, join, page_width, pages_shape, split


@pytest.mark.parametrize(
    ("head_dim", "tpu"), [(8, 128), (64, 128), (65, 256), (72, 256), (80, 256), (96, 256), (128, 256), (256, 512)]
)
def test_kernels_pages_width(head_dim, tpu):
    assert page_width(head_dim, "tpu") == tpu
    assert page_width(head_dim, "gpu") == page_width(head_dim, "cpu") == 2 * head_dim
    assert pages_shape(7, 3, 16, head_dim, "tpu") == (7, 3, 16, tpu)


@pytest.mark.parametrize("width", [10, 12, 128])
def test_kernels_pages_join_and_split(width):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(4, 2, 5)), jnp.float32) for _ in range(2))
    rows = join(k, v, width)
    expected = np.zeros((4, 2, width), np.float32)
    expected[..., :5], expected[..., width // 2 : width // 2 + 5] = k, v
    chex.assert_trees_all_equal(np.asarray(rows), expected)
    chex.assert_trees_all_equal(split(rows, 5), (k, v))


def test_kernels_pages_that_do_not_hold_the_heads():
    for dtype in ("bfloat16", "float16", "float32"):
        check_pages(jnp.zeros((1, 1, 1, 16), dtype), 8)
    with pytest.raises(ValueError, match="rows of W = 16; a key and a value of 9 need W even and at least 18"):
        check_pages(jnp.zeros((1, 1, 1, 16)), 9)
    with pytest.raises(ValueError, match="rows of W = 17; a key and a value of 8"):
        check_pages(jnp.zeros((1, 1, 1, 17)), 8)
    with pytest.raises(ValueError, match="pages are bfloat16 or float16 or float32, got int32"):
        check_pages(jnp.zeros((1, 1, 1, 16), jnp.int32), 8)
    for dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
        with pytest.raises(NotImplementedError, match=f"pages of {dtype}: quantised pages are not built"):
            check_pages(jnp.zeros((1, 1, 1, 16), dtype), 8)
