"""A scatter, in place where the pages are donated."""

from kernels_pallas.pages import join
from kernels_pallas.platform import refuse_interpret


def kv_write(pages, k, v, slots, *, interpret=False):
    """See `kernels_pallas.kv_write.kv_write`."""
    refuse_interpret("xla", interpret)
    page_size, W = pages.shape[2:]
    rows = join(k, v, W).astype(pages.dtype)  # [T, K, W]
    return pages.at[slots // page_size, :, slots % page_size].set(rows, mode="drop")
