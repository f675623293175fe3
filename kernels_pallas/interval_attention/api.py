"""The public call of dense attention, its checks, and its implementations by name."""

import math
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kernels_pallas.interval_attention import pallas_gpu, pallas_tpu, reference, xla
from kernels_pallas.interval_attention.differentiable import Call, attend
from kernels_pallas.intervals import check_intervals
from kernels_pallas.platform import refuse_interpret, select


def _reference(*operands, scale, soft_cap, interpret, with_lse):
    refuse_interpret("reference", interpret)
    out, lse = reference.interval_attention(*operands, scale=scale, soft_cap=soft_cap)
    return out, lse if with_lse else None


def _with_derivative(module):
    def call(*operands, **options):
        return attend(Call(module.forward, module.backward, **options), *operands)

    return call


IMPLEMENTATIONS = {
    "reference": _reference,
    "xla": _with_derivative(xla),
    "pallas_tpu": _with_derivative(pallas_tpu),
    "pallas_gpu": _with_derivative(pallas_gpu),
}
"""TPU takes "pallas_tpu", GPUs from A100 on "pallas_gpu", all else "xla"."""


def interval_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_start: Int[Array, "B T"],
    kv_stop: Int[Array, "B T"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Attention in which row ``i`` sees the keys ``kv_start[i] <= j < kv_stop[i]``.

    Args:
      q, k, v: N query heads share K key and value heads in groups of N // K.
      kv_start, kv_stop: int32, in ``[0, S]``; a row with ``kv_stop <= kv_start`` gives zeros.
      scale: factor on the scores; ``1 / sqrt(H)`` by default.
      soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)`` before masking.
      return_lse: also give each row's log-sum, the natural logarithm of its sum of exponentials, float32; -inf for a
        row that sees no key. Outputs over disjoint keys join by their log-sums.
      implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu"; None picks by platform.
      interpret: run a Pallas kernel as plain JAX, for tests.

    Returns:
      The output ``[B, T, N, H]``, and with ``return_lse`` the log-sums ``[B, T, N]`` beside it.

    Softmax and accumulation are in float32. What stands in a key or value that no row sees has no effect, NaN
    included, nor does the query of a row that sees no key. Differentiable by q, k and v in reverse mode.

    Raises:
      ValueError: shapes or dtypes that do not fit; where they are known, intervals outside ``[0, S]``; an
        implementation that is not there, or ``interpret`` with one that is no Pallas kernel.
      NotImplementedError: a head dimension or dtype that the implementation can't do.
    """
    _check(q, k, v, kv_start, kv_stop)
    chosen = select(implementation, IMPLEMENTATIONS)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = chosen(
        q, k, v, kv_start, kv_stop, scale=scale, soft_cap=soft_cap, interpret=interpret, with_lse=return_lse
    )
    return (out, lse) if return_lse else out


def _check(q, k, v, kv_start, kv_stop) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, kv_start {kv_start.shape}, kv_stop {kv_stop.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"expected q [B, T, N, H] and k, v [B, S, K, H], got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k differ in batch or head dimension: {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads can't share {k.shape[2]} key heads evenly: {shapes}")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ValueError(f"q, k and v are floating point, got {q.dtype}, {k.dtype}, {v.dtype}")
    if kv_start.shape != q.shape[:2] or kv_stop.shape != q.shape[:2]:
        raise ValueError(f"expected intervals [B, T]: {shapes}")
    if kv_start.dtype != "int32" or kv_stop.dtype != "int32":
        raise ValueError(f"intervals are int32, got {kv_start.dtype} and {kv_stop.dtype}")
    if not isinstance(kv_start, Tracer) and not isinstance(kv_stop, Tracer):
        check_intervals(kv_start, kv_stop, k.shape[1])
