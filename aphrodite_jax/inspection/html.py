"""An explanation as a piece of HTML that needs nothing else: coloured tokens, and a picture of each mask."""

import html

import numpy as np

from aphrodite_jax.inspection.explanation import Explanation
from aphrodite_jax.inspection.text import item_line, mask_line, summary_lines
from kernels_pallas.intervals import RowIntervals

__all__ = ["explanation_html"]

COLOURS = ("#ffd8a8", "#b2f2bb", "#a5d8ff", "#eebefa", "#ffc9c9", "#c3fae8")
"""Of the tokens of media, one item after another."""
PICTURE_SIZE = 160
"""Pixels a side of a mask's picture."""
MOST_STEPS = 320
"""Rows that a picture has a step for; of more rows it has every second one, or third."""
TOKEN = "display:inline-block;margin:1px;padding:0 3px;border-radius:3px;white-space:pre;color:#111;background:"


def explanation_html(told: Explanation) -> str:
    """All of it, for a notebook."""
    lines = [*summary_lines(told), *(item_line(index, item) for index, item in enumerate(told.items))]
    colours = _colours(told)
    begins = {begin for begin, _ in told.chunks[1:]}
    tokens = "".join(
        ('<span style="color:#c92a2a">&#9475;</span>' if place in begins else "") + _token(told, place, colours[place])
        for place in range(len(told.tokens))
    )
    pictures = "".join(
        f'<figure style="display:inline-block;margin:8px 16px 0 0">{_picture(rows)}<figcaption>'
        f"{html.escape(mask_line(kind, rows))}</figcaption></figure>"
        for kind, rows in told.intervals.items()
    )
    heading = "<br/>".join(map(html.escape, lines))
    return (
        f'<div style="font-family:monospace;font-size:12px"><p>{heading}</p>'
        f'<div style="line-height:1.7">{tokens}</div>{pictures}</div>'
    )


def _token(told: Explanation, place: int, colour: str) -> str:
    sees = ", ".join(f"{kind} [{rows.start[place]}, {rows.stop[place]})" for kind, rows in told.intervals.items())
    title = f"token {place}, id {told.token_ids[place]}, sees {sees}"
    dim = "opacity:0.45;" if place < told.num_cached else ""
    text = told.tokens[place].replace("\n", "\\n")
    return f'<span style="{dim}{TOKEN}{colour}" title="{html.escape(title)}">{html.escape(text)}</span>'


def _colours(told: Explanation) -> list[str]:
    """Of each token; text is grey, an item's tokens have its colour."""
    colours = ["#e9ecef"] * len(told.tokens)
    for index, item in enumerate(told.items):
        begin, count = item.info.offset, item.info.num_tokens
        colours[begin : begin + count] = [COLOURS[index % len(COLOURS)]] * count
    return colours


def _picture(rows: RowIntervals) -> str:
    """Rows from top to bottom, keys from left to right; what is seen is one shape."""
    length = len(rows.start)
    places = np.unique(np.linspace(0, length, min(length, MOST_STEPS) + 1).astype(int))
    tops, bottoms = places[:-1], places[1:]
    right = [f"{rows.stop[top]},{y}" for top, bottom in zip(tops, bottoms, strict=True) for y in (top, bottom)]
    left = [f"{rows.start[top]},{y}" for top, bottom in zip(tops, bottoms, strict=True) for y in (top, bottom)]
    return (
        f'<svg width="{PICTURE_SIZE}" height="{PICTURE_SIZE}" viewBox="0 0 {length} {length}" '
        f'preserveAspectRatio="none" style="background:#f4f4f4"><polygon fill="#2f5d8a" '
        f'points="{" ".join(right + left[::-1])}"/></svg>'
    )
