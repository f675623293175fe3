"""The layout of pages: keys and values of one layer in one array ``[P, K, page_size, W]``.

A token's key and value of one head stand side by side in one row of W values, zeros after each on TPU; the rows of
a head follow one another within a page, so that a kernel copies a head's part of a page as one block.

                     page p, head k                    H = 64, TPU (W = 128)     |k 0:64        |v 64:128       |
    offset 0   | key of token 0 | value of token 0 |   H = 80, TPU (W = 256)     |k 0:80|0 0 0 0|v 128:208|0 0 0|
    offset 1   | key of token 1 | value of token 1 |   H = 80, elsewhere (160)   |k 0:80|v 80:160|
      ...
    page_size-1

TPU's vectors have 128 lanes, and an array whose last axis is no multiple of them is copied whole to be read by a
kernel. Key and value each begin at a multiple of W / 2; that is how W alone tells where values stand.

Quantised pages would keep this shape in int8 or float8, with scales ``[P, K, page_size]`` beside it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["check_pages", "join", "page_width", "pages_shape", "split"]

DTYPES = ("bfloat16", "float16", "float32")
LANES = 128
"""Lanes of a TPU's vector registers."""


def page_width(head_dim: int, platform: str) -> int:
    """W for heads of ``head_dim`` on a platform ("tpu", "gpu", "cpu"): values that one token's key and value take.

    On TPU 80 gives 256, elsewhere 160.
    """
    if platform != "tpu":
        return 2 * head_dim
    return LANES if 2 * head_dim <= LANES else 2 * (-(-head_dim // LANES) * LANES)


def pages_shape(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, platform: str
) -> tuple[int, int, int, int]:
    """Shape ``(P, K, page_size, W)`` of one layer's pages of ``page_size`` tokens."""
    return num_pages, num_kv_heads, page_size, page_width(head_dim, platform)


def join(k: Float[Array, "... H"], v: Float[Array, "... H"], width: int) -> Float[Array, "... W"]:
    """Keys and values side by side in rows of ``width`` (even, at least 2H), zeros after each."""
    padding = [(0, 0)] * (k.ndim - 1) + [(0, width // 2 - k.shape[-1])]
    return jnp.concatenate([jnp.pad(k, padding), jnp.pad(v, padding)], axis=-1)


def split(rows: Float[Array, "... W"], head_dim: int) -> tuple[Float[Array, "... H"], Float[Array, "... H"]]:
    """Keys and values of rows of pages; what stands after each is left out."""
    half = rows.shape[-1] // 2
    return rows[..., :head_dim], rows[..., half : half + head_dim]


def check_pages(pages, head_dim: int) -> None:
    """Raise if pages ``[P, K, page_size, W]`` can't hold keys and values of ``head_dim``.

    Raises:
      ValueError: W is odd or too small, or the dtype is none that pages have.
      NotImplementedError: quantised pages.
    """
    if pages.dtype.itemsize == 1:
        raise NotImplementedError(f"pages of {pages.dtype}: quantised pages are not built; {' or '.join(DTYPES)} are")
    if pages.dtype not in DTYPES:
        raise ValueError(f"pages are {' or '.join(DTYPES)}, got {pages.dtype}")
    W = pages.shape[-1]
    if W % 2 or head_dim > W // 2:
        raise ValueError(
            f"pages {pages.shape} have rows of W = {W}; a key and a value of {head_dim} need W even and at least "
            f"{2 * head_dim} (pages_shape tells the shape)"
        )
