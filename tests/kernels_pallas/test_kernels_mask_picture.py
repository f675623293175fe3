"""The picture of a mask: what is drawn where, and what it says when it can't draw."""

import subprocess
import sys

import numpy as np
import pytest
from kernels_cases import mask_of

from kernels_pallas import intervals
from kernels_pallas.intervals import RowIntervals
from kernels_pallas.mask_picture import picture

ROWS = intervals.bidirectional_spans(intervals.causal(12, window=6), [(3, 6), (8, 9)])


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra 'notebooks'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def drawn(ax) -> np.ndarray:
    """The one image of the axes, as what its legend calls each cell."""
    (image,) = ax.images
    names = {patch.get_facecolor(): text.get_text() for patch, text in legend(ax)}
    colours = image.to_rgba(image.get_array())
    return np.array([[names[tuple(cell)] for cell in row] for row in colours])


def legend(ax):
    key = ax.get_legend()
    return list(zip(key.get_patches(), key.get_texts(), strict=True))


def test_kernels_picture_fills_what_is_seen(plt):
    ax = picture(ROWS)
    assert isinstance(ax, plt.Axes)
    seen = mask_of(*ROWS, 12)
    np.testing.assert_array_equal(drawn(ax), np.where(seen, "seen", "not seen"))
    assert ax.get_xlabel() == "key"
    assert ax.get_ylabel() == "row"
    # Cell (i, j) covers row i and key j, and row 0 is on top.
    assert ax.images[0].get_extent() == [0, 12, 12, 0]


def test_kernels_picture_keys_default_to_the_last_that_is_seen(plt):
    assert picture(intervals.causal(3, offset=4)).images[0].get_array().shape == (3, 7)
    assert picture(intervals.full(2), num_keys=5).images[0].get_array().shape == (2, 5)
    assert picture(RowIntervals(*np.zeros((2, 4), np.int32))).images[0].get_array().shape == (4, 1)


def test_kernels_picture_outlines_spans(plt):
    ax = picture(ROWS, spans=[(3, 6), (8, 9)])
    boxes = [(*p.get_xy(), p.get_width(), p.get_height()) for p in ax.patches]
    assert boxes == [(3, 3, 3, 3), (8, 8, 1, 1)]
    assert not any(p.get_fill() for p in ax.patches)


def test_kernels_picture_colours_blocks(plt):
    """Every cell says what a kernel does with its block, and whether the row sees the key."""
    ax = picture(intervals.causal(12), block_q=4, block_k=3)
    cells = drawn(ax)
    seen = mask_of(*intervals.causal(12), 12)
    for i in range(0, 12, 4):
        for j in range(0, 12, 3):
            block, inside = cells[i : i + 4, j : j + 3], seen[i : i + 4, j : j + 3]
            if inside.all():
                assert set(block.flat) == {"seen, block free of masking"}
            elif inside.any():
                np.testing.assert_array_equal(block, np.where(inside, "seen, block masked", "not seen, block masked"))
            else:
                assert set(block.flat) == {"block skipped"}
    rules = {tuple(map(tuple, path.vertices)) for line in ax.collections for path in line.get_paths()}
    assert ((3, 0), (3, 12)) in rules
    assert ((0, 4), (12, 4)) in rules
    assert len(rules) == 5 + 4


def test_kernels_picture_shows_gaps_of_a_hull_and_padding_rows(plt):
    """A block inside a row block's hull that no row sees is computed, not skipped; so is one with an empty row."""
    rows = RowIntervals(np.int32([0, 8, 4, 0]), np.int32([4, 12, 8, 0]))
    cells = drawn(picture(rows, block_q=2, block_k=4))
    assert set(cells[:2, 4:8].flat) == {"not seen, block masked"}
    assert set(cells[2, 4:8]) == {"seen, block masked"}
    assert set(cells[2:, :4].flat) == {"block skipped"}


def test_kernels_picture_draws_into_given_axes(plt):
    _, (left, right) = plt.subplots(1, 2)
    assert picture(ROWS, ax=right) is right
    assert not left.images
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_q": 4}, "block_q and block_k"),
        ({"num_keys": 5}, r"outside \[0, 5\]"),
        ({"spans": [(5, 3)]}, r"\[5, 3\)"),
        ({"intervals": RowIntervals(*np.zeros((2, 2, 3), np.int32))}, r"one sequence.*\(2, 3\)"),
    ],
)
def test_kernels_picture_errors_say_what_is_wrong(plt, arguments, message):
    with pytest.raises(ValueError, match=message):
        picture(**{"intervals": ROWS, **arguments})
    assert not plt.get_fignums()


def test_kernels_picture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        picture(ROWS)


def test_kernels_picture_imports_matplotlib_when_it_draws_and_not_before():
    check = "import sys, kernels_pallas.mask_picture; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=120).returncode == 0
