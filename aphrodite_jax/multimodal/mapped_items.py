"""What mappers made of items, kept by content so that an item that comes again is not mapped again."""

import threading
from collections import OrderedDict

import numpy as np

from aphrodite_jax.multimodal.inputs import MultiModalInputs, NestedArrays

__all__ = ["MappedItems"]

CAPACITY = 256 * 2**20
"""Bytes of arrays kept for one model."""


class MappedItems:
    """A least-recently-used cache of `MultiModalInputs`, bounded in bytes; safe to share between threads."""

    def __init__(self, capacity: int = CAPACITY):
        self._capacity = capacity
        self._kept: OrderedDict[tuple, MultiModalInputs] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple) -> MultiModalInputs | None:
        """What is kept under ``key``."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple, inputs: MultiModalInputs) -> None:
        """Keep ``inputs``, and drop the least recently used where there is no room; too large a one is not kept."""
        size = num_bytes(inputs)
        with self._lock:
            if key in self._kept or size > self._capacity:
                return
            self._kept[key] = inputs
            self._bytes += size
            while self._bytes > self._capacity:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= num_bytes(dropped)


def num_bytes(inputs: MultiModalInputs) -> int:
    """Bytes of all arrays."""
    return sum(map(_num_bytes, inputs.values()))


def _num_bytes(value: NestedArrays) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else sum(map(_num_bytes, value))
