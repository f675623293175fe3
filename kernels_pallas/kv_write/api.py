"""The public call of writing to pages, its checks, and its implementations by name."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kernels_pallas.kv_write import pallas_tpu, reference, xla
from kernels_pallas.pages import check_pages
from kernels_pallas.platform import select

IMPLEMENTATIONS = {"reference": reference.kv_write, "xla": xla.kv_write, "pallas_tpu": pallas_tpu.kv_write}
"""TPU takes "pallas_tpu"; GPU and CPU take "xla", whose scatter writes in place there."""


def kv_write(
    pages: Float[Array, "P K page_size W"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int[Array, " T"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "P K page_size W"]:
    """Pages with keys ``k`` and values ``v`` put at ``slots``; in place where the caller donates the pages.

    Args:
      pages: one layer's pages (`kernels_pallas.pages`), W at least 2H; k and v are cast to their dtype.
      slots: int32, ``page * page_size + offset``; a slot of P * page_size or more drops its row, which is how padding
        is told apart. The others are distinct, and none is negative.
      implementation: "reference", "xla" or "pallas_tpu"; None picks by platform.
      interpret: run a Pallas kernel as plain JAX, for tests.

    Raises:
      ValueError: shapes, dtypes or (where they are known) slots that do not fit, an implementation that is not
        there, or ``interpret`` with one that is no Pallas kernel.
      NotImplementedError: quantised pages.
    """
    _check(pages, k, v, slots)
    return select(implementation, IMPLEMENTATIONS)(pages, k, v, slots, interpret=interpret)


def _check(pages, k, v, slots) -> None:
    shapes = f"pages {pages.shape}, k {k.shape}, v {v.shape}"
    if pages.ndim != 4 or k.ndim != 3 or k.shape != v.shape or k.shape[1] != pages.shape[1] or 0 in pages.shape:
        raise ValueError(f"expected pages [P, K, page_size, W] and k, v [T, K, H], got {shapes}")
    check_pages(pages, k.shape[2])
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (k, v)):
        raise ValueError(f"k and v are floating point, got {k.dtype} and {v.dtype}")
    if slots.shape != k.shape[:1] or slots.dtype != "int32":
        raise ValueError(f"expected int32 slots [T = {len(k)}], got {slots.dtype} {slots.shape}")
    if isinstance(slots, Tracer):
        return
    slots = np.asarray(slots)
    if (slots < 0).any():
        row = int(np.argmax(slots < 0))
        raise ValueError(f"slots are not negative, got slots[{row}] = {slots[row]}")
    written = np.sort(slots[slots < pages.shape[0] * pages.shape[2]])
    if (twice := written[1:][written[1:] == written[:-1]]).size:
        raise ValueError(f"slots of rows that are written are distinct, got {twice[0]} more than once")
