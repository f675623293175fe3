"""Assertions that name what differs."""

from typing import Any

import jax
import numpy as np

__all__ = ["assert_trees_all_close"]


def assert_trees_all_close(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 1e-6) -> None:
    """As `chex.assert_trees_all_close`, but that the message names each leaf that differs, and by how much.

    Raises:
      AssertionError: another structure, shape or dtype, or a difference above ``atol + rtol * abs(expected)``.
    """
    left, right = (jax.tree_util.tree_flatten_with_path(tree) for tree in (actual, expected))
    if left[1] != right[1]:
        raise AssertionError(f"trees differ in structure: {left[1]} and {right[1]}")
    problems = []
    for (path, a), (_, b) in zip(left[0], right[0], strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name = jax.tree_util.keystr(path) or "the only leaf"
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(f"{name} is {a.dtype}{list(a.shape)}, expected {b.dtype}{list(b.shape)}")
        elif not np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True):
            distance = np.abs(a.astype(np.float64) - b.astype(np.float64))
            place = np.unravel_index(int(np.nanargmax(distance)), a.shape)
            problems.append(f"{name}{list(map(int, place))} is {a[place]}, expected {b[place]}")
    if problems:
        raise AssertionError("trees differ:\n  " + "\n  ".join(problems))
