"""The cases that `kernels_pallas.bench` measures: sizes, intervals, and what no implementation can go below.

Sizes are those of published models (Llama 3 8B, PaliGemma, Gemma 3 4B, CLIP-L, SigLIP); all arrays are bfloat16.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import dataclasses
from collections.abc import Callable

import numpy as np

from kernels_pallas.intervals import RowIntervals, bidirectional_spans, causal, full, packed, prefix

__all__ = ["CASES", "MASKS", "Case", "Dense", "Paged", "Write", "estimated"]

ITEM = 2
"""Bytes of a bfloat16."""
GEMMA_SPANS = [(a, a + 256) for a in (256, 1280, 2304, 3328)]
SEGMENT = 512

MASKS: dict[str, Callable[[int], RowIntervals]] = {
    "causal": causal,
    "full": full,
    "prefix": lambda length: prefix(causal(length), length * 2 // 3),
    "window and spans": lambda length: bidirectional_spans(
        causal(length, window=1024), [span for span in GEMMA_SPANS if span[1] <= length]
    ),
    "packed": lambda length: packed(causal(length), [(a, a + SEGMENT) for a in range(0, length, SEGMENT)]),
}
"""Intervals of one sequence, by its length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Dense self-attention of ``batch`` sequences of ``length`` tokens.

    ``parts``: what takes long is measured for one part in so many, of the sequences or, where there is one, of the
    heads, and an estimate of cycles multiplied. That counts ``parts`` times what a call does once: the copies before
    its first program, which nothing hides. It is 2% of causal attention over 4096 tokens, but a quarter of a vision
    tower over its sequences; so estimates of such a case are of the ``whole``.
    """

    about: str
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: str
    batch: int = 1
    parts: int = 1
    whole: bool = False
    backward: bool = False

    @property
    def op(self) -> str:
        """The function measured."""
        return "interval_attention" + (" backward" if self.backward else "")

    @property
    def part(self) -> "Dense":
        """One of the parts."""
        if self.batch > 1:
            return dataclasses.replace(self, batch=self.batch // self.parts, parts=1)
        heads, kv_heads = self.num_heads // self.parts, self.num_kv_heads // self.parts
        return dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads, parts=1)

    def intervals(self) -> RowIntervals:
        """int32 ``[B, T]``."""
        return RowIntervals(*(np.tile(x, (self.batch, 1)) for x in MASKS[self.mask](self.length)))

    def flops(self) -> int:
        """Of the pairs of row and key that are seen: two products forward, five backward, 2 H operations a pair."""
        start, stop = self.intervals()
        pairs = int(np.maximum(stop - start, 0).sum())
        return pairs * 2 * self.head_dim * self.num_heads * (5 if self.backward else 2)

    def bytes(self) -> int:
        """q, k, v in and the output out once each; backward also the output's gradient in, and three gradients out."""
        rows, keys = (self.batch * self.length * n * self.head_dim for n in (self.num_heads, self.num_kv_heads))
        return ITEM * (3 * rows + 4 * keys if self.backward else 2 * rows + 2 * keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
    """Attention of ragged rows over pages.

    ``requests`` holds ``(keys, rows)`` of each request, its keys those of the rows included; those of one row are
    decoded and come first, the others stand in tiles of 16.
    """

    about: str
    requests: tuple[tuple[int, int], ...]
    page_size: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    parts: int = 1

    TILE = 16
    op = "paged_attention"

    def __post_init__(self):
        rows = [rows for _, rows in self.requests]
        if rows != sorted(rows) or any(n > 1 and n % self.TILE for n in rows):
            raise ValueError(f"requests of one row come first, others have whole tiles of {self.TILE}; got {rows}")

    @property
    def part(self) -> "Paged":
        """One part in ``parts``, of the heads."""
        heads, kv_heads = self.num_heads // self.parts, self.num_kv_heads // self.parts
        return dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads, parts=1)

    @property
    def kernels(self) -> list["Paged"]:
        """What is decoded and what is prefilled, which are calls of their own."""
        each = [tuple(x for x in self.requests if (x[1] == 1) == decoded) for decoded in (True, False)]
        return [dataclasses.replace(self, requests=requests) for requests in each if requests]

    @property
    def decode_rows(self) -> int:
        """Rows that are tiles of their own."""
        return sum(rows == 1 for _, rows in self.requests)

    @property
    def pages_per_request(self) -> int:
        """Columns of the block tables."""
        return max(-(-keys // self.page_size) for keys, _ in self.requests)

    def intervals(self) -> RowIntervals:
        """int32 ``[T]``."""
        each = [causal(rows, offset=keys - rows, window=self.window) for keys, rows in self.requests]
        return RowIntervals(*(np.concatenate(x) for x in zip(*each, strict=True)))

    def tile_request(self) -> np.ndarray:
        """int32 ``[tiles]``."""
        tiles = [1 if rows == 1 else rows // self.TILE for _, rows in self.requests]
        return np.repeat(np.arange(len(tiles), dtype=np.int32), tiles)

    def flops(self) -> int:
        """Of the pairs of row and key that are seen."""
        start, stop = self.intervals()
        return int((stop - start).sum()) * 4 * self.head_dim * self.num_heads

    def bytes(self) -> int:
        """Rows in and out, and each key and value that a row of its request sees, once."""
        each = [causal(rows, offset=keys - rows, window=self.window) for keys, rows in self.requests]
        keys = sum(int(x.stop.max() - x.start.min()) for x in each)
        rows = sum(rows for _, rows in self.requests)
        return ITEM * self.head_dim * 2 * (rows * self.num_heads + keys * self.num_kv_heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """New keys and values of ``(keys, rows)`` of each request, as in `Paged`, into pages."""

    about: str
    requests: tuple[tuple[int, int], ...]
    page_size: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    parts: int = 1

    op = "kv_write"

    @property
    def part(self) -> "Write":
        """All of it."""
        return self

    @property
    def pages_per_request(self) -> int:
        """Pages that a request has."""
        return max(-(-keys // self.page_size) for keys, _ in self.requests)

    def slots(self) -> np.ndarray:
        """int32 ``[T]``: a request's pages follow one another."""
        size = self.pages_per_request * self.page_size
        each = [r * size + np.arange(keys - rows, keys) for r, (keys, rows) in enumerate(self.requests)]
        return np.concatenate(each).astype(np.int32)

    def flops(self) -> int:
        """None."""
        return 0

    def bytes(self) -> int:
        """The rows, read once and written once."""
        rows = sum(rows for _, rows in self.requests)
        return ITEM * rows * self.num_kv_heads * 2 * self.head_dim * 2


Case = Dense | Paged | Write


def estimated(case: Case) -> tuple[Case, int]:
    """What is compiled for an estimate of cycles, and how many of it make the case."""
    whole = isinstance(case, Dense) and case.whole
    return (case, 1) if whole else (case.part, case.parts)


DECODE = ((2048, 1),) * 64
CHUNKS = ((2048, 512),) * 4
LLAMA = dict(length=4096, num_heads=32, num_kv_heads=8, head_dim=128, parts=4)
TOWER = dict(batch=8, mask="full", num_heads=16, num_kv_heads=16, parts=8, whole=True)

CASES: dict[str, Case] = {
    "a": Dense(about="causal, 4096 tokens, 32/8 heads of 128", mask="causal", **LLAMA),
    "b": Dense(
        about="prefix-LM, 1024 + 512 tokens, 8/1 heads of 256",
        mask="prefix",
        length=1536,
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
    ),
    "c": Dense(
        about="window of 1024 and four spans of 256, 4096 tokens, 8/4 heads of 256",
        mask="window and spans",
        length=4096,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
    ),
    "d": Dense(about="packed, 8 x 512 tokens, 32/8 heads of 128", mask="packed", whole=True, **LLAMA),
    "e577": Dense(about="vision tower, 8 x 577 patches, 16 heads of 64", length=577, head_dim=64, **TOWER),
    "e729": Dense(about="vision tower, 8 x 729 patches, 16 heads of 72", length=729, head_dim=72, **TOWER),
    "bw-a": Dense(about="gradients of a", mask="causal", backward=True, **LLAMA),
    "f16": Paged(about="decode, 64 x 2048 keys, 32/8 heads of 128, pages of 16", requests=DECODE, page_size=16),
    "f64": Paged(about="the same, pages of 64", requests=DECODE, page_size=64),
    "f128": Paged(about="the same, pages of 128", requests=DECODE, page_size=128),
    "fw": Paged(about="decode, a window of 1024 hides half of 2048 keys", requests=DECODE, page_size=64, window=1024),
    "g": Paged(about="prefill of 4096 tokens, 32/8 heads of 128", requests=((4096, 4096),), page_size=64, parts=4),
    "h": Paged(
        about="60 decode rows and 4 chunks of 512 rows, 2048 keys each", requests=DECODE[:60] + CHUNKS, page_size=64
    ),
    "h-decode": Paged(about="the 60 decode rows of h alone", requests=DECODE[:60], page_size=64),
    "h-prefill": Paged(about="the 4 chunks of h alone", requests=CHUNKS, page_size=64),
    "w64": Write(about="keys and values of 64 decode rows, 8 heads of 128", requests=DECODE),
    "w512": Write(about="keys and values of a chunk of 512 rows", requests=((2048, 512),)),
}
"""By the name that ``--case`` takes."""
