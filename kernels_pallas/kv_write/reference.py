"""The oracle: one row after another."""

import jax
import jax.numpy as jnp

from kernels_pallas.pages import join
from kernels_pallas.platform import refuse_interpret


def kv_write(pages, k, v, slots, *, interpret=False):
    """See `kernels_pallas.kv_write.kv_write`."""
    refuse_interpret("reference", interpret)
    P, K, page_size, W = pages.shape
    rows = join(k, v, W).astype(pages.dtype)

    def put(t, pages):
        page, offset = slots[t] // page_size, slots[t] % page_size
        new = jax.lax.dynamic_update_slice(pages, rows[t].reshape(1, K, 1, W), (page, 0, offset, 0))
        return jnp.where(slots[t] < P * page_size, new, pages)

    return jax.lax.fori_loop(0, len(slots), put, pages)
