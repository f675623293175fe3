"""Several examples in one row axis: masks are row intervals, so an example is a segment and needs no batch axis.

Two examples of 3 and 2 rows in 6 rows, under a causal mask:

    row         0  1  2  3  4  5
    position    0  1  2  0  1  0
    kv_start    0  0  0  3  3  0
    kv_stop     1  2  3  4  5  0    the last row is padding, and sees nothing
"""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aphrodite_jax.engine.sequence import MediaItem
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.multimodal.shapes import next_step
from aphrodite_jax.tuning.examples import PreparedExample
from kernels_pallas.intervals import RowIntervals

__all__ = ["Batch", "BatchSizes", "MediaShape", "media_shapes", "pack", "pack_order"]

MediaShape = tuple[tuple[str, tuple[int, ...], str], ...]
"""Name, shape and dtype of the arrays of an item: items of one shape are encoded together."""
WINDOW = 32
"""Examples that a pack may pass over in search of some that still fit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A pack of examples as arrays: one call of the model.

    Attributes:
      input_ids: ``[T]``.
      positions: ``[T]`` or ``[axes, T]``, each example's own.
      metadata: row intervals, shifted to where the examples stand, and the length of each row's example.
      media: the arrays of the items of each shape, with the items first.
      embeds: rows that were given in the place of media, ``[n, D]``; None where there are none.
      media_rows: which row of all encoded ones, shape after shape and then ``embeds``, stands in the place of each
        token's embedding; -1 for none.
      answer_rows: rows whose next token is one of an answer.
      targets: those tokens.
      counts: whether they are tokens, and no padding.
    """

    input_ids: Int[Array, " T"]
    positions: Int[Array, " T"] | Int[Array, "axes T"]
    metadata: AttentionMetadata
    media: tuple[Mapping[str, Array], ...]
    embeds: Float[Array, "n D"] | None
    media_rows: Int[Array, " T"]
    answer_rows: Int[Array, " A"]
    targets: Int[Array, " A"]
    counts: Bool[Array, " A"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """To which sizes the arrays of batches are filled up, so that few programs serve all batches of a run.

    Attributes:
      rows: of the row axis; at least those of the examples.
      answers: tokens of answers.
      media: most items of each shape in one batch: batches have so many, or a half, a quarter ... of them.
    """

    rows: int
    answers: int
    media: Mapping[MediaShape, int] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(packs: Sequence[Sequence[PreparedExample]], rows: int) -> "BatchSizes":
        """What these packs need."""
        return BatchSizes.for_counts([[(e.num_answers, media_shapes(e)) for e in examples] for examples in packs], rows)

    @staticmethod
    def for_counts(packs: Sequence[Sequence[tuple[int, Counter[MediaShape]]]], rows: int) -> "BatchSizes":
        """As `of`, from the tokens of answers and the media of each example."""
        answers, media = 1, Counter()
        for examples in packs:
            answers = max(answers, sum(count for count, _ in examples))
            media |= sum((shapes for _, shapes in examples), Counter())
        return BatchSizes(rows=rows, answers=answers, media=dict(media))

    def items(self, shape: MediaShape, count: int) -> int:
        """Items to encode where ``count`` are needed."""
        size = self.media.get(shape, count)
        while (half := -(-size // 2)) >= count and half < size:
            size = half
        return size


def media_shapes(example: PreparedExample) -> Counter[MediaShape]:
    """How many items of each shape an example has; those given as embeddings are not among them."""
    return Counter(_shape(item) for item in example.media if item.embeds is None)


def pack(examples: Sequence[PreparedExample], sizes: BatchSizes) -> Batch:
    """The examples behind one another, then padding: rows that see nothing and count for nothing.

    Raises:
      ValueError: they have more rows or tokens of answers than there is room for.
    """
    rows, answers = sum(e.num_rows for e in examples), sum(e.num_answers for e in examples)
    if rows > sizes.rows or answers > sizes.answers:
        raise ValueError(f"{rows} rows and {answers} tokens of answers do not fit in {sizes.rows} and {sizes.answers}")
    offsets = np.cumsum([0, *(e.num_rows for e in examples)]).tolist()[:-1]

    def padded(parts, size: int = sizes.rows, fill: int = 0) -> Any:
        joined = np.concatenate(list(parts), axis=-1).astype(np.int32)
        padding = [(0, 0)] * (joined.ndim - 1) + [(0, size - joined.shape[-1])]
        return np.pad(joined, padding, constant_values=fill)

    def intervals(kind: str) -> RowIntervals:
        return RowIntervals(
            *(
                padded(e.intervals[kind][end] + np.int32(offset) for e, offset in zip(examples, offsets, strict=True))
                for end in (0, 1)
            )
        )

    media, embeds, media_rows = _place_media(examples, offsets, sizes)
    return Batch(
        input_ids=padded(e.tokens[:-1] for e in examples),
        positions=padded(e.positions for e in examples),
        metadata=AttentionMetadata(
            intervals={kind: intervals(kind) for kind in examples[0].intervals},
            lengths=padded((np.maximum(np.arange(e.num_rows) + 1, e.prompt_length) for e in examples), fill=1),
        ),
        media=media,
        embeds=embeds,
        media_rows=media_rows,
        answer_rows=padded(
            (offset + np.arange(e.prompt_length - 1, e.num_rows) for e, offset in zip(examples, offsets, strict=True)),
            sizes.answers,
        ),
        targets=padded((e.tokens[e.prompt_length :] for e in examples), sizes.answers),
        counts=np.arange(sizes.answers) < answers,  # pyright: ignore[reportArgumentType]
    )


def pack_order(lengths: Sequence[int], row_length: int, *, seed: int) -> Iterator[tuple[int, ...]]:
    """Which examples stand in each pack, without end: a function of its arguments alone.

    Each epoch has another order, and follows the one before without a gap. A pack takes the examples in order that
    still fit, until `WINDOW` were passed over; these come first in the next.

    Args:
      lengths: rows of each example, none above ``row_length``.
    """
    epochs = (np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist() for epoch in itertools.count())
    order = itertools.chain.from_iterable(epochs)
    least, most_passed = min(lengths), min(WINDOW, len(lengths))
    waiting: deque[int] = deque()
    while True:
        taken, passed, free = [], [], row_length
        while free >= least and len(passed) < most_passed:
            index = waiting.popleft() if waiting else next(order)
            fits = lengths[index] <= free
            (taken if fits else passed).append(index)
            free -= lengths[index] if fits else 0
        waiting.extendleft(reversed(passed))
        yield tuple(taken)


def _shape(item: MediaItem) -> MediaShape:
    return tuple((name, array.shape[1:], str(array.dtype)) for name, array in sorted(_arrays(item).items()))


def _arrays(item: MediaItem) -> Mapping[str, np.ndarray]:
    assert item.mm_kwargs is not None, "an item to encode, not rows"
    return item.mm_kwargs


def _place_media(
    examples: Sequence[PreparedExample], offsets: Sequence[int], sizes: BatchSizes
) -> tuple[tuple[dict[str, Any], ...], Any, Any]:
    """The arrays of all items by shape, given embeddings, and which encoded row each token takes."""
    placed = [
        (item, offset + item.placeholder.row_tokens, encoded)
        for example, offset in zip(examples, offsets, strict=True)
        for item, encoded in zip(example.media, example.encoded_rows, strict=True)
    ]
    groups: dict[MediaShape, list] = {}
    for item, *place in placed:
        if item.embeds is None:
            groups.setdefault(_shape(item), []).append((_arrays(item), *place))
    media, media_rows, first = [], np.full(sizes.rows, -1, np.int32), 0
    for shape, group in sorted(groups.items(), key=lambda entry: entry[0]):
        added = sizes.items(shape, len(group)) - len(group)
        filled = [arrays for arrays, _, _ in group] + [group[0][0]] * added
        media.append({name: np.concatenate([arrays[name] for arrays in filled]) for name, _, _ in shape})
        for _, places, encoded in group:
            media_rows[places] = first + np.arange(len(places))  # rows past them are padding of the item's
            first += encoded
        first += added * group[0][2]
    given = [(item.embeds, places) for item, places, _ in placed if item.embeds is not None]
    if not given:
        return tuple(media), None, media_rows
    for rows, places in given:
        media_rows[places] = first + np.arange(len(rows))
        first += len(rows)
    embeds = np.concatenate([rows for rows, _ in given])
    return tuple(media), np.pad(embeds, ((0, next_step(len(embeds)) - len(embeds)), (0, 0))), media_rows
