"""New keys and values into pages."""

from jaxtyping import Array, Float, Int

__all__ = ["kv_write"]


def kv_write(
    pages: Float[Array, "P page_size K H"], rows: Float[Array, "T K H"], slots: Int[Array, " T"]
) -> Float[Array, "P page_size K H"]:
    """Pages with ``rows`` put at ``slots`` (page * page_size + offset); in place where the caller donates them.

    Slots are distinct and not negative; a slot past the last page drops its row, which is how padding is told
    apart.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    if pages.ndim != 4 or rows.ndim != 3 or rows.shape[1:] != pages.shape[2:]:
        raise ValueError(f"expected pages [P, page_size, K, H] and rows [T, K, H], got {pages.shape} and {rows.shape}")
    if slots.shape != rows.shape[:1] or slots.dtype != "int32":
        raise ValueError(f"expected int32 slots [T = {rows.shape[0]}], got {slots.dtype} {slots.shape}")
    P, page_size, K, H = pages.shape
    flat = pages.reshape(P * page_size, K, H)
    return flat.at[slots].set(rows.astype(pages.dtype), mode="drop").reshape(pages.shape)
