"""No input processor: nobody says where the rows of an item stand."""

from right_model import build

CLAUSE = "the registration is complete"
Model = build(processor=None)
