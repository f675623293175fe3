"""One derivative and one rule for `jax.vmap`, for every implementation that has a forward and a backward pass.

The backward pass makes the weights again from the rows' log-sums, so that what is kept is linear in tokens
(FlashAttention-2, https://arxiv.org/abs/2307.08691).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["Call", "attend"]


class Call(NamedTuple):
    """What is static of a call.

    Attributes:
      forward: ``(q, k, v, kv_start, kv_stop, *, scale, soft_cap, interpret, with_lse)`` to the output
        ``[B, T, N, H]`` and the log-sums ``[B, T, N]``, float32, -inf for a row that sees no key; None in their place
        without ``with_lse``.
      backward: ``(q, k, v, kv_start, kv_stop, lse, delta, d_out, *, scale, soft_cap, interpret)`` to the gradients by
        q, k and v; ``delta`` is ``sum_h(d_out * out) - d_lse``, float32 ``[B, T, N]``.
      scale, soft_cap, interpret: for both.
      with_lse: whether log-sums are wanted.
    """

    forward: Callable
    backward: Callable
    scale: float
    soft_cap: float | None
    interpret: Any
    with_lse: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, q, k, v, kv_start, kv_stop):
    """Output, and log-sums or None; differentiable by q, k and v in reverse mode, through either."""
    return _folded(_bind(call, call.forward, with_lse=call.with_lse))(q, k, v, kv_start, kv_stop)


def _forward(call, q, k, v, kv_start, kv_stop):
    operands = (q, k, v, kv_start, kv_stop)
    out, lse = _folded(_bind(call, call.forward, with_lse=True))(*operands)
    return (out, lse if call.with_lse else None), (*operands, out, lse)


def _backward(call, kept, gradients):
    *operands, out, lse = kept
    d_out, d_lse = gradients
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    if d_lse is not None:
        delta = delta - jnp.where(jnp.isfinite(lse), d_lse, 0)  # 0 * inf is NaN in what comes after an empty row
    by = _folded(_bind(call, call.backward))(*operands, lse, delta, d_out)
    return *by, None, None


attend.defvjp(_forward, _backward)


def _bind(call: Call, function, **options):
    return partial(function, scale=call.scale, soft_cap=call.soft_cap, interpret=call.interpret, **options)


def _folded(function):
    """``function`` of arrays that start with the batch; `jax.vmap` of it makes the batch larger.

    A mapped axis would otherwise turn the bounds of loops into masks over all that they carry.
    """
    inner = custom_vmap(function)

    @inner.def_vmap
    def fold(axis_size, in_batched, *arrays):
        arrays = [
            x if batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            for x, batched in zip(arrays, in_batched, strict=True)
        ]
        out = _folded(function)(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return inner
