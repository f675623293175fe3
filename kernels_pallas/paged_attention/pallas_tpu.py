"""Paged attention on TPU: a Mosaic kernel for decode rows, and one for tiles of prefill."""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import jax.numpy as jnp

from kernels_pallas.paged_attention.pallas_tpu_decode import decode
from kernels_pallas.paged_attention.pallas_tpu_prefill import prefill

__all__ = ["paged_attention"]


def paged_attention(
    q,
    pages,
    block_tables,
    tile_request,
    kv_start,
    kv_stop,
    *,
    decode_rows=0,
    scale,
    soft_cap=None,
    interpret=False,
    measured=None,
):
    """See `kernels_pallas.paged_attention.paged_attention`.

    Args:
      measured: ``(tile_request, kv_start, kv_stop)`` as NumPy arrays, for the compiler's estimate of cycles alone,
        which takes scalars that are not known for zeros.

    Raises:
      NotImplementedError: dtypes, page sizes or row widths that the kernels can't take.
    """
    parts = []
    for kernel, rows in ((decode, slice(0, decode_rows)), (prefill, slice(decode_rows, None))):
        operands = tile_request[rows], kv_start[rows], kv_stop[rows]
        if not len(operands[0]):
            continue
        known = None if measured is None else tuple(x[rows] for x in measured)
        if known is not None and kernel is decode:
            known = known[1:]
        options = dict(scale=scale, soft_cap=soft_cap, interpret=interpret, measured=known)
        parts.append(kernel(q[rows], pages, block_tables, *operands, **options))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
