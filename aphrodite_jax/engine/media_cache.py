"""Mapped media by content hash, within a bound of bytes, so that an image that comes again is not processed again."""

import threading
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

__all__ = ["MediaCache"]

Arrays = Mapping[str, np.ndarray]


class MediaCache:
    """Keeps the arrays that were asked for last; threads may share it.

    Args:
      max_bytes: of all arrays; an item that is larger is not kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits, self.misses = 0, 0
        self._items: OrderedDict[str, Arrays] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def get(self, content_hash: str) -> Arrays | None:
        """The arrays of an item, not to be written to; None where they are not there. Counts as a use."""
        with self._lock:
            arrays = self._items.get(content_hash)
            if arrays is None:
                self.misses += 1
                return None
            self.hits += 1
            self._items.move_to_end(content_hash)
            return arrays

    def put(self, content_hash: str, arrays: Arrays) -> None:
        """Keep arrays, which are read-only from now on; others make room, the least recently used first."""
        size = _nbytes(arrays)
        with self._lock:
            if content_hash in self._items or size > self.max_bytes:
                return
            for array in arrays.values():
                array.flags.writeable = False
            self._items[content_hash] = arrays
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, evicted = self._items.popitem(last=False)
                self.num_bytes -= _nbytes(evicted)


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
