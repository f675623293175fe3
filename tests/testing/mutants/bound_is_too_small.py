"""The bound is that of a usual picture, not of the largest."""

from right_model import build

CLAUSE = "no item takes more tokens than the registered bound"
Model = build(bound=lambda ctx: 4)
