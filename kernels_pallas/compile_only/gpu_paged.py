"""Paged attention's GPU kernels and their arguments, for `kernels_pallas.compile_only.gpu` to compile."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["paged_attention"]


def paged_attention(
    *,
    decode_rows: int = 64,
    prefill_tiles: int = 64,
    tile_rows: int = 16,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 16,
    context: int = 4096,
    dtype: str = "bfloat16",
    soft_cap: float | None = None,
    cores: int = 132,
    for_decode: Sequence[int] | None = None,
    for_prefill: Sequence[int] | None = None,
):
    """Decode rows of a request each and prefill tiles, with room for ``context`` keys a request.

    ``for_decode`` and ``for_prefill`` are `Blocks` as lists, in place of the kernel's own.
    """
    from kernels_pallas.paged_attention import pallas_gpu
    from kernels_pallas.pages import pages_shape

    requests = max(decode_rows, 1)
    rows = decode_rows + prefill_tiles * tile_rows
    pages_per_request = context // page_size

    def function(*operands):
        return pallas_gpu.paged_attention(
            *operands,
            decode_rows=decode_rows,
            scale=head_dim**-0.5,
            soft_cap=soft_cap,
            cores=cores,
            for_decode=for_decode and pallas_gpu.Blocks(*for_decode),
            for_prefill=for_prefill and pallas_gpu.Blocks(*for_prefill),
        )

    interval = jax.ShapeDtypeStruct((rows,), jnp.int32)
    pages = pages_shape(requests * pages_per_request, num_kv_heads, page_size, head_dim, "gpu")
    return function, (
        jax.ShapeDtypeStruct((rows, num_heads, head_dim), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct(pages, jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((requests, pages_per_request), jnp.int32),
        jax.ShapeDtypeStruct((decode_rows + prefill_tiles,), jnp.int32),
        interval,
        interval,
    )
