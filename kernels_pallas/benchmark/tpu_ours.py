"""This package's kernels on a case, as `kernels_pallas.compile_only.tpu` takes them: a function and its arguments.

The kernels are given what their scalar operands hold, which the compiler's cycle model reads as zeros otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmark.cases import CASES, Case, Dense, Paged, Write, estimated
from kernels_pallas.pages import pages_shape

__all__ = ["array", "build", "build_paged", "kernels"]


def kernels(case: Case) -> list[tuple[str, Case]]:
    """Names of a case's kernels among the compiler's ops, and what each does of the case."""
    if not isinstance(case, Paged):
        return [(case.op.replace(" ", "_") + ".1", case)]
    return [(f"paged_attention_{'decode' if part.decode_rows else 'prefill'}.1", part) for part in case.kernels]


def build(case: str):
    """What to compile for a case of `CASES`, at its measured part."""
    part, _ = estimated(CASES[case])
    return {Dense: _dense, Paged: _paged, Write: _write}[type(part)](part)


def build_paged(**sizes):
    """What to compile for paged attention of other sizes than those of the cases, the fields of `Paged`."""
    requests = tuple(map(tuple, sizes.pop("requests")))
    return _paged(Paged(about="", requests=requests, **sizes))


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _dense(case: Dense):
    B, T, N, K, H = case.batch, case.length, case.num_heads, case.num_kv_heads, case.head_dim
    from kernels_pallas.interval_attention import pallas_tpu

    options = dict(scale=H**-0.5, soft_cap=None, interpret=False, measured=case.intervals())

    # Heads and their values stand in one axis, as a model's projections leave them.
    def heads(x):
        return x.reshape(B, T, -1, H)

    def forward(q, k, v, start, stop):
        q, k, v = map(heads, (q, k, v))
        out, _ = pallas_tpu.forward(q, k, v, start, stop, with_lse=False, blocks=None, **options)
        return out.reshape(B, T, -1)

    def backward(q, k, v, start, stop, lse, delta, d_out):
        q, k, v, d_out = map(heads, (q, k, v, d_out))
        gradients = pallas_tpu.backward(q, k, v, start, stop, lse, delta, d_out, **options)
        return [x.reshape(B, T, -1) for x in gradients]

    q, k, interval = array(B, T, N * H), array(B, T, K * H), array(B, T, dtype=jnp.int32)
    row = array(B, T, N, dtype=jnp.float32)
    operands = q, k, k, interval, interval
    return (backward, (*operands, row, row, q)) if case.backward else (forward, operands)


def _paged(case: Paged):
    from kernels_pallas.paged_attention import pallas_tpu

    measured = case.tile_request(), *case.intervals()
    R, M = len(case.requests), case.pages_per_request

    def function(*operands):
        options = dict(scale=case.head_dim**-0.5, decode_rows=case.decode_rows, measured=measured)
        return pallas_tpu.paged_attention(*operands, **options)

    tiles, rows, _ = (array(len(x), dtype=jnp.int32) for x in measured)
    q = array(rows.shape[0], case.num_heads, case.head_dim)
    pages = array(*pages_shape(R * M, case.num_kv_heads, case.page_size, case.head_dim, "tpu"))
    return function, (q, pages, array(R, M, dtype=jnp.int32), tiles, rows, rows)


def _write(case: Write):
    from kernels_pallas.kv_write import pallas_tpu

    slots = case.slots()
    pages = pages_shape(
        len(case.requests) * case.pages_per_request, case.num_kv_heads, case.page_size, case.head_dim, "tpu"
    )
    new = array(len(slots), case.num_kv_heads, case.head_dim)

    def function(pages, k, v, to):
        return pallas_tpu.kv_write(pages, k, v, to, measured=np.asarray(slots))

    return function, (array(*pages), new, new, array(len(slots), dtype=jnp.int32)), {"donate": (0,)}
