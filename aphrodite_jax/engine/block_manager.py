"""Pages of the KV cache: which are free, and which each sequence holds."""

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
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, the lowest page on top
        self._tables: dict[str, np.ndarray] = {}  # longer than what is held, so that it grows by doubling
        self._held: dict[str, int] = {}

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def can_allocate(self, sequence_id: str, num_tokens: int) -> bool:
        """Whether the sequence could hold ``num_tokens`` in all: with the pages it has and the free ones."""
        return self._missing(sequence_id, num_tokens) <= len(self._free)

    def grow(self, sequence_id: str, num_tokens: int) -> None:
        """Give the sequence the pages it lacks for ``num_tokens`` in all; it never loses one here.

        Raises:
          ValueError: too few pages are free; nothing was given.
        """
        missing = self._missing(sequence_id, num_tokens)
        if missing > len(self._free):
            raise ValueError(
                f"sequence {sequence_id} lacks {missing} pages for {num_tokens} tokens, {len(self._free)} are free"
            )
        held = self._held.get(sequence_id, 0)
        table = self._tables.get(sequence_id, np.zeros(0, np.int32))
        if held + missing > len(table):
            larger = np.zeros(max(held + missing, 2 * len(table)), np.int32)
            larger[:held] = table[:held]
            table = self._tables[sequence_id] = larger
        for index in range(held, held + missing):
            table[index] = self._free.pop()
        self._held[sequence_id] = held + missing

    def free(self, sequence_id: str) -> None:
        """Take back all pages of the sequence; one that holds none is left as it is."""
        held = self._held.pop(sequence_id, 0)
        table = self._tables.pop(sequence_id, np.zeros(0, np.int32))
        self._free.extend(table[:held][::-1].tolist())

    def block_table(self, sequence_id: str) -> np.ndarray:
        """The sequence's pages in order, int32 ``[pages]``, not to be written to; empty where it holds none."""
        table = self._tables.get(sequence_id, np.zeros(0, np.int32))[: self._held.get(sequence_id, 0)]
        table.flags.writeable = False
        return table

    def _missing(self, sequence_id: str, num_tokens: int) -> int:
        pages = -(-num_tokens // self.page_size)
        return max(0, pages - self._held.get(sequence_id, 0))
