"""Where a prompt may be cut: two rules that follow from the ends of row intervals alone, whatever the family.

A chunk of a prompt may be computed once no row of it needs a key behind it, and pages of a prefix may serve another
prompt if nothing behind the prefix went into them. Both hold at the same places.

    span [2, 5) seen by its rows    row        0  1  2  3  4  5
                                    stop       1  2  5  5  5  6
                                    may end    y  y  .  .  y  y    after the row
"""

import numpy as np
from jaxtyping import Int

__all__ = ["ends_cleanly", "last_clean_end", "reusable_prefix"]


def ends_cleanly(stop: np.ndarray) -> np.ndarray:
    """Whether a prefill chunk or a reused prefix may end after each row: ``max(stop[: i + 1]) <= i + 1``.

    stop [2, 2, 3, 5, 5] gives [False, True, True, False, True]. Where layers differ in their mask, take the
    elementwise maximum of their stops.
    """
    return np.maximum.accumulate(stop) <= np.arange(1, len(stop) + 1)


def last_clean_end(stop: Int[np.ndarray, " T"], limit: int, *, begin: int = 0) -> int:
    """Where a prefill chunk from ``begin`` may end: the last clean end in ``(begin, limit]``, or ``begin`` if none.

    ``stop`` is of the whole prompt; ``limit`` may lie behind its end.
    """
    return _last_end(stop, begin, limit, 1)


def reusable_prefix(stop: Int[np.ndarray, " T"], cached: int, *, page_size: int = 1) -> int:
    """Of ``cached`` first tokens whose pages are there, how many may be reused: whole pages up to a clean end, or 0.

    Keys and values of rows before a clean end depend on tokens before it alone. They serve another prompt that begins
    with the same tokens and media, if its rows have the same intervals too: two prefix-LM prompts of different length
    may share tokens and not keys. Pass ``cached`` less than the prompt's length where a row must be left to compute
    logits from.
    """
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}: expected 1 at least")
    return _last_end(stop, 0, cached, page_size)


def _last_end(stop, begin: int, limit: int, multiple_of: int) -> int:
    if limit < 0 or not 0 <= begin <= len(stop):
        raise ValueError(f"begin is {begin} of {len(stop)} rows and limit is {limit}: expected rows of the prompt")
    ends = 1 + np.flatnonzero(ends_cleanly(stop)[:limit])
    ends = ends[(ends > begin) & (ends % multiple_of == 0)]
    return int(ends[-1]) if len(ends) else begin
