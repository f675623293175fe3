"""Rows of the items come back in the reverse order."""

from right_model import build, rows_of

CLAUSE = "an item's rows depend on it alone"
Model = build(rows=lambda projector, pixels, is_strip: rows_of(projector, pixels[::-1], is_strip[::-1]))
