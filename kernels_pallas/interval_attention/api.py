"""The public call of dense attention, its checks, and its implementations by name."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.interval_attention import reference, xla
from kernels_pallas.platform import select

IMPLEMENTATIONS = {"reference": reference.interval_attention, "xla": xla.interval_attention}


def interval_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_start: Int[Array, "B T"],
    kv_stop: Int[Array, "B T"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention in which row ``i`` sees the keys ``kv_start[i] <= j < kv_stop[i]``.

    Args:
      q, k, v: N query heads share K key and value heads in groups of N // K.
      kv_start, kv_stop: int32, in ``[0, S]``; a row with ``kv_stop <= kv_start`` gives zeros.
      scale: factor on the scores; ``1 / sqrt(H)`` by default.
      soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)`` before masking.
      implementation: "reference" or "xla"; None picks by platform.

    Softmax and accumulation are in float32. What stands in a key or value that no row sees has no effect, NaN
    included. Differentiable by q, k and v in reverse mode.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that is not there.
    """
    _check(q, k, v, kv_start, kv_stop)
    chosen = select(implementation, IMPLEMENTATIONS)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return chosen(q, k, v, kv_start, kv_stop, scale=scale, soft_cap=soft_cap)


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
