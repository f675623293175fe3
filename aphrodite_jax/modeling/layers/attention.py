"""The one place where models meet attention: row intervals in, heads out, pages written on the way."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from aphrodite_jax.modeling.layers.observer import current_observer
from aphrodite_jax.modeling.sharding import MODEL, current_mesh, model_axis_size, over_model_axis
from kernels_pallas import interval_attention, kv_write, paged_attention
from kernels_pallas.intervals import RowIntervals

__all__ = ["AttentionMetadata", "KVCache", "PagedLayout", "attend", "attend_batch"]


KVCache = Float[Array, "P K page_size W"]
"""One layer's pages of keys and values (`kernels_pallas.pages`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedLayout:
    """Where a batch's rows read and write their keys and values.

    Attributes:
      slots: ``[T]`` slot (page * page_size + offset) of each row's own key; past the last page for padding.
      block_tables: ``[R, M]`` pages of each request.
      tile_request: ``[G]`` request of each tile.
      decode_rows: static; the first rows, which are tiles of one row each. The others stand in equal tiles.
    """

    slots: Int[Array, " T"]
    block_tables: Int[Array, "R M"]
    tile_request: Int[Array, " G"]
    decode_rows: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """What attention must know of a batch.

    Attributes:
      intervals: mask kind to the row intervals ``[T]``, in key positions of the row's own request.
      lengths: ``[T]`` tokens of the row's request when the row is computed, ``max(position + 1, prompt)``; None
        where all rows are one prompt.
      paged: the pages; None where keys and values are those of this call (training, tests).
    """

    intervals: Mapping[str, RowIntervals]
    lengths: Int[Array, " T"] | None = None
    paged: PagedLayout | None = None


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: KVCache | None,
    metadata: AttentionMetadata,
    *,
    mask: str,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "T N H"], KVCache | None]:
    """Attention of one decoder layer under the mask kind ``mask``.

    With a cache, ``k`` and ``v`` are written to its pages first, and the new pages are returned.
    """
    start, stop = map(jnp.asarray, metadata.intervals[mask])
    if kv_cache is None:
        observer = current_observer()
        if observer is not None:
            observer.see_attention(q, k, RowIntervals(start, stop), scale=scale, soft_cap=soft_cap)
        rows = RowIntervals(start[None], stop[None])
        return attend_batch(q[None], k[None], v[None], rows, scale=scale, soft_cap=soft_cap)[0], None
    paged = metadata.paged
    assert paged is not None, "a batch with a cache says where its pages are"

    def write_and_attend(q, k, v, kv_cache, slots, block_tables, tile_request, start, stop):
        pages = kv_write(kv_cache, k, v, slots)
        options = {"decode_rows": paged.decode_rows, "scale": scale, "soft_cap": soft_cap}
        return paged_attention(q, pages, block_tables, tile_request, start, stop, **options), pages

    if current_mesh() is not None:  # each device has its own heads, and their pages
        k, v = _heads_for_all(k), _heads_for_all(v)
        by_head = P(None, MODEL)
        write_and_attend = over_model_axis(write_and_attend, (by_head,) * 4 + (P(),) * 5, (by_head, by_head))
    return write_and_attend(q, k, v, kv_cache, paged.slots, paged.block_tables, paged.tile_request, start, stop)


def attend_batch(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    intervals: RowIntervals | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attention within each item of a batch, as in a vision tower; intervals ``[B, T]``, None: all see all."""
    if intervals is None:
        start = jnp.zeros(q.shape[:2], jnp.int32)
        intervals = RowIntervals(start, jnp.full_like(start, k.shape[1]))

    def attention(q, k, v, start, stop):
        return interval_attention(q, k, v, start, stop, scale=scale, soft_cap=soft_cap)

    devices = model_axis_size()
    if devices > 1:  # a kernel's call is one that XLA can't divide
        specs: tuple[P, ...] = (P(),) * 5  # all heads on every device
        if q.shape[2] % devices == 0 and (k.shape[2] % devices == 0 or devices % k.shape[2] == 0):
            k, v = _heads_for_all(k), _heads_for_all(v)
            specs = (P(None, None, MODEL),) * 3 + (P(),) * 2
        attention = over_model_axis(attention, specs, specs[0])
    return attention(q, k, v, *map(jnp.asarray, intervals))


def _heads_for_all(x: Float[Array, "*rows K H"]) -> Float[Array, "*rows heads H"]:
    """Key or value heads, one for each device at least: repeated where they are fewer."""
    return jnp.repeat(x, max(1, model_axis_size() // x.shape[-2]), axis=-2)
