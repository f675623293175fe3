"""A picture of a mask for notebooks: what each row sees, and what a kernel does with each block."""

from collections.abc import Iterable

import numpy as np

from kernels_pallas.block_bounds import block_bounds
from kernels_pallas.intervals import RowIntervals, check_intervals, to_mask

__all__ = ["picture"]

PLAIN = {"not seen": "#f4f4f4", "seen": "#2f5d8a"}
BLOCKS = {
    "block skipped": "#ffffff",
    "not seen, block masked": "#f6dfc1",
    "seen, block masked": "#d9822b",
    "seen, block free of masking": "#2f7d5b",
}


def picture(
    intervals: RowIntervals,
    *,
    num_keys: int | None = None,
    spans: Iterable[tuple[int, int]] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    ax=None,
):
    """Draw the mask of one sequence, rows from top to bottom and keys from left to right.

    Args:
      intervals: ``[T]`` each.
      num_keys: keys to draw; up to the last one seen by default.
      spans: outlined where rows and keys of a span meet; row 0 is key position 0.
      block_q, block_k: with both, cells are coloured by what a kernel with such blocks does: skips the block, computes
        and masks it, or computes it as it is (`kernels_pallas.block_bounds`).
      ax: matplotlib Axes to draw into; new ones by default.

    Returns:
      The matplotlib Axes.

    Raises:
      ImportError: matplotlib is not there.
      ValueError: intervals of several sequences or outside the keys, a span that ends before it starts, or one block
        size without the other.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise ImportError("a picture of a mask needs matplotlib: pip install matplotlib") from error

    start, stop = (np.asarray(x) for x in intervals)
    if start.ndim != 1:
        raise ValueError(f"a picture shows one sequence, intervals [T]; got {start.shape}")
    if (block_q is None) != (block_k is None):
        raise ValueError(f"expected block_q and block_k together, got {block_q} and {block_k}")
    spans = list(spans or ())
    if any(not 0 <= a <= b for a, b in spans):
        raise ValueError(f"spans [a, b) have 0 <= a <= b, got {', '.join(f'[{a}, {b})' for a, b in spans)}")
    if num_keys is None:
        num_keys = max(1, int(np.where(stop > start, stop, 0).max(initial=0)))
    check_intervals(start, stop, num_keys)

    cells = to_mask(RowIntervals(start, stop), num_keys).astype(np.int32)
    if block_q is not None and block_k is not None:
        cells = _block_cells(cells, start, stop, block_q, block_k)
    colours = PLAIN if block_q is None else BLOCKS
    T = len(start)
    if ax is None:
        ax = pyplot.subplots()[1]
    ax.imshow(
        cells,
        cmap=ListedColormap(list(colours.values())),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        extent=(0, num_keys, T, 0),
        interpolation="nearest",
    )
    if block_q is not None and block_k is not None:
        grid = {"colors": "#808080", "linewidth": 0.5}
        ax.vlines(_edges(num_keys, block_k), 0, T, **grid)
        ax.hlines(_edges(T, block_q), 0, num_keys, **grid)
    for a, b in spans:
        ax.add_patch(Rectangle((a, a), b - a, b - a, fill=False, edgecolor="#b3202c", linewidth=1.5))
    ax.set(xlabel="key", ylabel="row", xlim=(0, num_keys), ylim=(T, 0))
    handles = [Patch(facecolor=colour, edgecolor="#808080", label=name) for name, colour in colours.items()]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return ax


def _block_cells(seen, start, stop, block_q: int, block_k: int):
    """Index into BLOCKS of each cell ``[T, S]``."""
    bounds = block_bounds(start.astype(np.int32), stop.astype(np.int32), block_q=block_q, block_k=block_k)
    first, last, free_first, free_last = (x[np.arange(len(start)) // block_q][:, None] for x in bounds)
    block = np.arange(seen.shape[1])[None] // block_k
    computed = (first <= block) & (block < last)
    free = (free_first <= block) & (block < free_last)
    return np.where(free, 3, np.where(computed, 1 + seen, 0))


def _edges(length: int, block: int) -> list[int]:
    return [*range(0, length, block), length]
