"""Encoded media by content hash: which rows of the device's encoder cache hold them, and who needs them still."""

import dataclasses
from collections import OrderedDict

import numpy as np

__all__ = ["EncoderCache"]


@dataclasses.dataclass
class _Entry:
    rows: np.ndarray
    users: set[str] = dataclasses.field(default_factory=set)


class EncoderCache:
    """Gives rows to media; entries that nobody pins make room for new ones, the least recently used first.

    Args:
      num_rows: rows of the device array, each one embedding.
    """

    def __init__(self, num_rows: int):
        self._free = list(range(num_rows - 1, -1, -1))
        self._entries: dict[str, _Entry] = {}
        self._unpinned: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._num_unpinned_rows = 0
        self._pins: dict[str, set[str]] = {}  # user to the hashes it pins

    def __contains__(self, content_hash: str) -> bool:
        """Whether an entry has rows; no use of it."""
        return content_hash in self._entries

    def lookup(self, content_hash: str) -> np.ndarray | None:
        """Rows of an entry in order, int32, not to be written to; None where there is none. Counts as a use."""
        entry = self._entries.get(content_hash)
        if entry is None:
            return None
        if not entry.users:
            self._unpinned.move_to_end(content_hash)
        return entry.rows

    def allocate(self, content_hash: str, num_rows: int) -> np.ndarray | None:
        """Rows for a new entry, pinned by nobody yet; they need not stand next to each other.

        Unpinned entries are evicted as far as needed. None, and nothing is evicted, where that gives no room.

        Raises:
          ValueError: the hash has an entry.
        """
        if content_hash in self._entries:
            raise ValueError(f"content hash {content_hash} has rows already")
        if num_rows > len(self._free) + self._num_unpinned_rows:
            return None
        while len(self._free) < num_rows:
            self.discard(next(iter(self._unpinned)))
        rows = np.array([self._free.pop() for _ in range(num_rows)], np.int32)
        rows.flags.writeable = False
        self._entries[content_hash] = _Entry(rows)
        self._unpinned[content_hash] = None
        self._num_unpinned_rows += num_rows
        return rows

    def pin(self, content_hash: str, user_id: str) -> None:
        """Keep an entry until the user unpins; twice is as once.

        Raises:
          ValueError: the hash has no entry.
        """
        entry = self._entries.get(content_hash)
        if entry is None:
            raise ValueError(f"content hash {content_hash} has no rows to pin")
        if not entry.users:
            del self._unpinned[content_hash]
            self._num_unpinned_rows -= len(entry.rows)
        entry.users.add(user_id)
        self._pins.setdefault(user_id, set()).add(content_hash)

    def unpin(self, user_id: str) -> None:
        """Let go of everything that the user pins; the entries stay until others need their rows."""
        for content_hash in sorted(self._pins.pop(user_id, ())):
            entry = self._entries[content_hash]
            entry.users.remove(user_id)
            if not entry.users:
                self._unpinned[content_hash] = None
                self._num_unpinned_rows += len(entry.rows)

    def discard(self, content_hash: str) -> None:
        """Forget an entry and free its rows, as where they were never filled.

        Raises:
          ValueError: the hash has no entry, or somebody pins it.
        """
        entry = self._entries.get(content_hash)
        if entry is None or entry.users:
            raise ValueError(f"content hash {content_hash} {'is pinned' if entry else 'has no rows'}")
        del self._entries[content_hash], self._unpinned[content_hash]
        self._num_unpinned_rows -= len(entry.rows)
        self._free.extend(entry.rows[::-1].tolist())

    def discard_unpinned(self) -> None:
        """Forget every entry that nobody pins."""
        for content_hash in list(self._unpinned):
            self.discard(content_hash)
