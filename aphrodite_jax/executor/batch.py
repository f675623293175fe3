# pyright: reportArgumentType=false
# (NumPy arrays here are JAX arrays once a program takes them.)
"""One step's rows as arrays: tokens, positions, intervals, pages, in the padded layout of a bucket.

Rows of decode come first, one a request, each a tile of its own. Chunks of prompts follow: each starts a new tile and
is padded to whole tiles.

    2 rows of decode in 4, then chunks of 3 and 2 rows, tiles of 2, in 8:
                                              a | b | - | - | c0 c1 | c2 -- | d0 d1 | -- --
                               tile_request   0 | 1 | 0 | 0 |   2   |   2   |   3   |   0

Padding rows see no key and write to no page.
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
      token_ids: ``[n]``; -1 for one that only the device knows yet: the latest of ``slot``.
      start: position of the first row.
      prompt_length: tokens of the request's prompt.
      intervals: mask kind to the rows' intervals ``[n]``.
      positions: ``[axes, n]`` of a model with several axes of positions; None where rows are numbered through.
      pages: pages of the request, in order, at least up to the last row.
      media_rows: ``[n]`` row of the encoder cache that replaces the token's embedding, -1 for none.
      slot: the request's place among the device's latest tokens.
    """

    token_ids: np.ndarray
    start: int
    prompt_length: int
    intervals: Mapping[str, RowIntervals]
    pages: np.ndarray
    positions: np.ndarray | None = None
    media_rows: np.ndarray | None = None
    slot: int = -1

    def __len__(self) -> int:
        return len(self.token_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """What the forward program takes: all ``[T]``, but ``last_rows`` ``[R]``, each request's last row.

    ``positions`` are ``[axes, T]`` where the model has several axes of them.

    ``token_slots`` says which rows take their token from the device's latest ones; -1 for the others.
    """

    input_ids: np.ndarray
    token_slots: np.ndarray
    positions: np.ndarray
    media_rows: np.ndarray
    last_rows: np.ndarray
    metadata: AttentionMetadata


def build_batch(
    decode: Sequence[Rows],
    prefill: Sequence[Rows],
    *,
    num_decode: int,
    num_prefill: int,
    num_requests: int,
    tile_size: int,
    mask_kinds: Sequence[str],
    page_size: int,
    num_pages: int,
    max_pages: int,
) -> tuple[ForwardBatch, np.ndarray]:
    """The padded batch of a bucket, and the offset of each request's first row in it ``[len(decode) + len(prefill)]``.

    Args:
      num_decode, num_prefill, num_requests, tile_size: the bucket.
      num_pages: of the whole cache; max_pages: of one request.

    Raises:
      ValueError: a request's pages are none of the cache's.
    """
    rows = [*decode, *prefill]
    lengths = np.array([len(r) for r in rows])
    tiles = -(-lengths[len(decode) :] // tile_size)
    offsets = np.concatenate([np.arange(len(decode)), num_decode + (np.cumsum(tiles) - tiles) * tile_size])
    # The i-th row of all stands at its request's offset, and as far behind as it is in its request.
    ends = np.cumsum(lengths)
    request = np.repeat(np.arange(len(rows)), lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    index = offsets[request] + within

    def padded(values, fill=0):
        out = np.full(num_decode + num_prefill, fill, np.int32)
        out[index] = values
        return out

    def joined(parts):
        return np.concatenate(list(parts))

    tables = np.zeros((num_requests, max_pages), np.int32)
    for table, r in zip(tables, rows, strict=False):
        table[: len(r.pages)] = r.pages
    check_block_tables(tables, num_pages)
    starts, prompt_lengths, slots = (
        np.array([getattr(r, name) for r in rows], np.int32) for name in ("start", "prompt_length", "slot")
    )
    tokens = joined(r.token_ids for r in rows)
    places = starts[request] + within
    given = [r.positions for r in rows if r.positions is not None]  # by all rows, or by none
    positions = np.stack([padded(axis) for axis in np.concatenate(given, axis=1)]) if given else padded(places)
    tile_request = np.zeros(num_decode + num_prefill // tile_size, np.int32)
    tile_request[: len(decode)] = np.arange(len(decode))
    tile_request[num_decode : num_decode + tiles.sum()] = np.repeat(np.arange(len(decode), len(rows)), tiles)
    last_rows = np.zeros(num_requests, np.int32)
    last_rows[: len(rows)] = offsets + lengths - 1
    no_media = np.full(int(lengths.max()), -1, np.int32)
    batch = ForwardBatch(
        input_ids=padded(np.maximum(tokens, 0)),
        token_slots=padded(np.where(tokens < 0, slots[request], -1), fill=-1),
        positions=positions,
        media_rows=padded(joined(no_media[: len(r)] if r.media_rows is None else r.media_rows for r in rows), fill=-1),
        last_rows=last_rows,
        metadata=AttentionMetadata(
            intervals={
                kind: RowIntervals(
                    padded(joined(r.intervals[kind].start for r in rows)),
                    padded(joined(r.intervals[kind].stop for r in rows)),
                )
                for kind in mask_kinds
            },
            lengths=padded(np.maximum(places + 1, prompt_lengths[request]), fill=1),
            paged=PagedLayout(
                slots=padded(
                    tables[request, places // page_size] * page_size + places % page_size,
                    fill=num_pages * page_size,
                ),
                block_tables=tables,
                tile_request=tile_request,
                decode_rows=num_decode,
            ),
        ),
    )
    return batch, offsets
