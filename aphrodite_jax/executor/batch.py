# pyright: reportArgumentType=false
# (NumPy arrays here are JAX arrays once a program takes them.)
"""One step's rows as arrays: tokens, positions, intervals, pages, in the padded layout of a bucket.

Prefill: each request's chunk starts a new tile and is padded to whole tiles.

    chunks of 3 and 2 rows, tiles of 2, bucket of 8:   a0 a1 | a2 -- | b0 b1 | -- --
                                       tile_request       0  |   0   |   1   |   0

Decode: one row a request, and each row is a tile. Padding rows see no key and write to no page.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from aphrodite_jax.modeling.layers.attention import AttentionMetadata, PagedLayout
from kernels_pallas.intervals import RowIntervals
from kernels_pallas.paged_attention import check_block_tables

__all__ = ["ForwardBatch", "Rows", "build_batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of one request that a step computes.

    Attributes:
      token_ids: ``[n]``.
      start: position of the first row.
      prompt_length: tokens of the request's prompt.
      intervals: mask kind to the rows' intervals ``[n]``.
      pages: pages of the request, in order, at least up to the last row.
      media_rows: ``[n]`` row of the encoder cache that replaces the token's embedding, -1 for none.
    """

    token_ids: np.ndarray
    start: int
    prompt_length: int
    intervals: Mapping[str, RowIntervals]
    pages: np.ndarray
    media_rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """What the forward program takes: all ``[T]``, but ``last_rows`` ``[R]``, each request's last row."""

    input_ids: np.ndarray
    positions: np.ndarray
    media_rows: np.ndarray
    last_rows: np.ndarray
    metadata: AttentionMetadata


def build_batch(
    rows: Sequence[Rows],
    *,
    num_tokens: int,
    num_requests: int,
    tile_size: int,
    mask_kinds: Sequence[str],
    page_size: int,
    num_pages: int,
    max_pages: int,
) -> tuple[ForwardBatch, np.ndarray]:
    """The padded batch of a bucket, and the offset of each request's first row in it ``[len(rows)]``.

    Args:
      num_tokens, num_requests, tile_size: the bucket; tiles of one row are decode.
      num_pages: of the whole cache; max_pages: of one request.

    Raises:
      ValueError: a request's pages are none of the cache's.
    """
    lengths = np.array([len(r) for r in rows])
    tiles = -(-lengths // tile_size)
    offsets = (np.cumsum(tiles) - tiles) * tile_size
    index = np.concatenate([np.arange(n) + offset for n, offset in zip(lengths, offsets, strict=True)])

    def padded(parts, fill=0):
        out = np.full(num_tokens, fill, np.int32)
        out[index] = np.concatenate(parts)
        return out

    positions = [np.arange(r.start, r.start + len(r), dtype=np.int32) for r in rows]
    slots = [r.pages[p // page_size] * page_size + p % page_size for r, p in zip(rows, positions, strict=True)]
    tables = np.zeros((num_requests, max_pages), np.int32)
    for table, r in zip(tables, rows, strict=False):
        table[: len(r.pages)] = r.pages
    check_block_tables(tables, num_pages)
    tile_request = np.zeros(num_tokens // tile_size, np.int32)
    tile_request[: tiles.sum()] = np.repeat(np.arange(len(rows)), tiles)
    last_rows = np.zeros(num_requests, np.int32)
    last_rows[: len(rows)] = offsets + lengths - 1
    no_media = [np.full(len(r), -1, np.int32) if r.media_rows is None else r.media_rows for r in rows]
    batch = ForwardBatch(
        input_ids=padded([r.token_ids for r in rows]),
        positions=padded(positions),
        media_rows=padded(no_media, fill=-1),
        last_rows=last_rows,
        metadata=AttentionMetadata(
            intervals={
                kind: RowIntervals(
                    padded([r.intervals[kind].start for r in rows]),
                    padded([r.intervals[kind].stop for r in rows]),
                )
                for kind in mask_kinds
            },
            lengths=padded([np.maximum(p + 1, r.prompt_length) for r, p in zip(rows, positions, strict=True)], fill=1),
            paged=PagedLayout(
                slots=padded(slots, fill=num_pages * page_size),
                block_tables=tables,
                tile_request=tile_request,
                decode_rows=num_tokens if tile_size == 1 else 0,
            ),
        ),
    )
    return batch, offsets
