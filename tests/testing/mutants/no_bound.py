"""No bound of tokens: nobody can tell how much room an item may take."""

from right_model import build

CLAUSE = "the registration is complete"
Model = build(bound=None)
