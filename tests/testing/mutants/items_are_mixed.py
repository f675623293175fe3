"""Pixels are normalised over the whole batch: an item's rows depend on who else is encoded."""

from right_model import build, rows_of

CLAUSE = "an item's rows depend on it alone"


def normalised(projector, pixels, is_strip):
    return rows_of(projector, pixels - pixels.mean(axis=0, keepdims=True), is_strip)


Model = build(rows=normalised)
