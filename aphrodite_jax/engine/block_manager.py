"""Pages of the KV cache: which are free, which each sequence holds, and which hold a prefix that may serve again.

A page that is full can be given a key, a name for its content and all that went into it (`engine.page_keys`). Sequences
that begin with the same keys share such pages. When the last holder lets go of one it stays as it is, until its room is
needed: then the page that was let go of first is taken.

    free      no key, nobody holds it         taken first
    held      by one sequence, or, with a key, by several
    idle      a key, nobody holds it          taken next, the least recently used first
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

__all__ = ["BlockManager"]


class BlockManager:
    """Hands out pages, numbered from 0; a sequence's tokens stand in its pages in order.

    Args:
      num_pages: pages of the cache.
      page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, the lowest page on top
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._holders = np.zeros(num_pages, np.int32)
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._tables: dict[str, np.ndarray] = {}  # longer than what is held, so that it grows by doubling
        self._held: dict[str, int] = {}

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) + len(self._idle)

    def can_allocate(self, sequence_id: str, num_tokens: int) -> bool:
        """Whether the sequence could hold ``num_tokens`` in all: with the pages it has and those that nobody holds."""
        return self.missing(sequence_id, num_tokens) <= self.num_free_pages

    def grow(self, sequence_id: str, num_tokens: int) -> int:
        """Give the sequence the pages it lacks for ``num_tokens`` in all, and tell how many; it never loses one here.

        Raises:
          ValueError: nobody holds too few; nothing was given.
        """
        missing = self.missing(sequence_id, num_tokens)
        if missing > self.num_free_pages:
            raise ValueError(
                f"sequence {sequence_id} lacks {missing} pages for {num_tokens} tokens, {self.num_free_pages} are free"
            )
        self._append(sequence_id, [self._take() for _ in range(missing)])
        return missing

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of the first ``keys`` have a page."""
        return next((index for index, key in enumerate(keys) if key not in self._page_of), len(keys))

    def can_share(self, keys: Sequence[bytes], num_tokens: int) -> bool:
        """Whether a new sequence that shares the pages of ``keys``, all known, could hold ``num_tokens`` in all."""
        idle = sum(self._holders[self._page_of[key]] == 0 for key in keys)
        return -(-num_tokens // self.page_size) - len(keys) <= self.num_free_pages - idle

    def share(self, sequence_id: str, keys: Sequence[bytes]) -> None:
        """Give a sequence that holds no page those of ``keys``, in order.

        Raises:
          ValueError: it holds one, or a key is not known; nothing was given.
        """
        if self._held.get(sequence_id):
            raise ValueError(f"sequence {sequence_id} holds pages already")
        if self.known(keys) < len(keys):
            raise ValueError(f"of the {len(keys)} keys that sequence {sequence_id} would share some are not known")
        pages = [self._page_of[key] for key in keys]
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1
        self._append(sequence_id, pages)

    def publish(self, sequence_id: str, index: int, key: bytes) -> None:
        """Name page ``index`` of the sequence, full from now on; of two with one key the first keeps it."""
        page = int(self.block_table(sequence_id)[index])
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def free(self, sequence_id: str) -> None:
        """The sequence lets go of all its pages; one that holds none is left as it is."""
        pages = self.block_table(sequence_id).tolist()
        self._held.pop(sequence_id, None)
        self._tables.pop(sequence_id, None)
        for page in reversed(pages):  # what comes late in a prefix is of less use
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget_idle(self) -> None:
        """Take the keys of all pages that nobody holds."""
        while self._idle:
            self._free.append(self._evict())

    def block_table(self, sequence_id: str) -> np.ndarray:
        """The sequence's pages in order, int32 ``[pages]``, not to be written to; empty where it holds none."""
        table = self._tables.get(sequence_id, np.zeros(0, np.int32))[: self._held.get(sequence_id, 0)]
        table.flags.writeable = False
        return table

    def _append(self, sequence_id: str, pages: list[int]) -> None:
        held = self._held.get(sequence_id, 0)
        table = self._tables.get(sequence_id, np.zeros(0, np.int32))
        if held + len(pages) > len(table):
            larger = np.zeros(max(held + len(pages), 2 * len(table)), np.int32)
            larger[:held] = table[:held]
            table = self._tables[sequence_id] = larger
        table[held : held + len(pages)] = pages
        self._held[sequence_id] = held + len(pages)

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._evict()
        self._holders[page] = 1
        return page

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def missing(self, sequence_id: str, num_tokens: int) -> int:
        """Pages that the sequence lacks for ``num_tokens`` in all."""
        pages = -(-num_tokens // self.page_size)
        return max(0, pages - self._held.get(sequence_id, 0))
