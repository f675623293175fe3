"""New keys and values into pages."""

from jaxtyping import Array, Float, Int


def kv_write(
    pages: Float[Array, "P page_size K H"], rows: Float[Array, "T K H"], slots: Int[Array, " T"]
) -> Float[Array, "P page_size K H"]:
    """Pages with ``rows`` put at ``slots`` (page * page_size + offset); in place where the caller donates them.

    Slots are distinct; a slot past the last page drops its row, which is how padding is told apart.
    """
    P, page_size, K, H = pages.shape
    flat = pages.reshape(P * page_size, K, H)
    return flat.at[slots].set(rows.astype(pages.dtype), mode="drop").reshape(pages.shape)
