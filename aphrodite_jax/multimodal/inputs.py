"""Keyword arrays for a model's ``__call__``: what input mappers return."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aphrodite_jax.errors import RegistrationError, RequestError

__all__ = ["MediaItems", "MultiModalInputs", "NestedArrays", "as_array"]

NestedArrays = np.ndarray | tuple["NestedArrays", ...]
"""An array, or, where shapes or dtypes differ, a tuple of arrays or of such tuples."""


def as_array(value: Any) -> np.ndarray | None:
    """``value`` as a NumPy array where it is one of any library; None for everything else."""
    if isinstance(value, np.ndarray):
        return value
    return np.asarray(value) if hasattr(value, "__array__") and hasattr(value, "dtype") else None


class MediaItems(list[Any]):
    """A list of which each element is one item, whatever it is; a plain list of frames, say, is one video."""


class MultiModalInputs(Mapping[str, NestedArrays]):
    """An immutable mapping of keyword to arrays on the host.

    Lists become tuples, and arrays read-only views of those given. A mapper's arrays have the items on axis 0:
    an array ``[items, ...]``, or a tuple of one value per item where items differ in shape.

    Raises:
      RegistrationError: a keyword that is no name, or a value that is no number array.
    """

    def __init__(self, arrays: Mapping[str, Any] | None = None):
        for keyword in arrays or ():
            if not isinstance(keyword, str) or not keyword.isidentifier():
                raise RegistrationError(f"a keyword of __call__ is a name, got {keyword!r}")
        self._arrays = {keyword: _frozen(value, keyword) for keyword, value in (arrays or {}).items()}

    def __getitem__(self, keyword: str) -> NestedArrays:
        return self._arrays[keyword]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MultiModalInputs):
            return NotImplemented
        return self.keys() == other.keys() and all(_equal(self[key], other[key]) for key in self)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # arrays have no hash

    def __repr__(self) -> str:
        values = ", ".join(f"{keyword}: {_summary(value)}" for keyword, value in self.items())
        return f"MultiModalInputs({values})"

    @staticmethod
    def batch(inputs: Sequence["MultiModalInputs"]) -> "MultiModalInputs":
        """Join one value per item into one with the items on axis 0.

        Values of one keyword are stacked where they have one shape and dtype, at every level of nesting, and
        kept as a tuple where they do not:

            [2, 3] and [2, 3]              give  [2, 2, 3]
            [2, 3] and [5, 3]              give  ([2, 3], [5, 3])
            ([3], [3]) and ([3], [3])      give  [2, 2, 3]
            ([3], [3]) and ([3],)          give  ([2, 3], [1, 3])

        Raises:
          RequestError: the inputs do not have the same keywords.
        """
        if not inputs:
            return MultiModalInputs()
        keywords = list(inputs[0])
        for other in inputs:
            if set(other) != set(keywords):
                raise RequestError(
                    "items that are batched have the same keywords, got "
                    f"{', '.join(sorted(keywords))} and {', '.join(sorted(other))}"
                )
        return MultiModalInputs({keyword: _stacked([i[keyword] for i in inputs]) for keyword in keywords})

    def split(self) -> tuple["MultiModalInputs", ...]:
        """One value per item: what `batch` was given, so ``batch(x.split())`` equals an ``x`` that it made.

        Raises:
          RegistrationError: the values have not all the same number of items on axis 0.
        """
        if not self._arrays:
            return ()
        return tuple(
            MultiModalInputs({keyword: value[i] for keyword, value in self.items()}) for i in range(self.num_items)
        )

    @property
    def num_items(self) -> int:
        """Items on axis 0 of every value; raises `RegistrationError` where they differ."""
        counts = {keyword: _num_items(value) for keyword, value in self.items()}
        if len(set(counts.values())) > 1 or None in counts.values():
            raise RegistrationError(f"axis 0 of every array is the items, got {self!r}")
        return next(iter(counts.values()), 0) or 0


def _num_items(value: NestedArrays) -> int | None:
    return None if isinstance(value, np.ndarray) and value.ndim == 0 else len(value)


def _frozen(value: Any, keyword: str) -> NestedArrays:
    if isinstance(value, list | tuple):
        return tuple(_frozen(element, keyword) for element in value)
    array = np.asarray(value)
    if array.dtype.kind in "OSUMm" or issubclass(array.dtype.type, np.void):
        raise RegistrationError(f"{keyword}: number arrays are expected, got {type(value).__name__}")
    array = array.view()
    array.flags.writeable = False
    return array


def _stacked(values: Sequence[NestedArrays]) -> NestedArrays:
    values = tuple(value if isinstance(value, np.ndarray) else _stacked(value) for value in values)
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    if not values or len(arrays) < len(values) or len({(a.shape, a.dtype) for a in arrays}) > 1:
        return values
    return np.stack(arrays)


def _equal(a: NestedArrays, b: NestedArrays) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))


def _summary(value: NestedArrays) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"({', '.join(map(_summary, value))})"
