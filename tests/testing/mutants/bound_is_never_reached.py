"""The bound is generous: memory is kept for tokens that never come."""

from right_model import build

CLAUSE = "the dummy data hold as many items as allowed"
Model = build(bound=lambda ctx: 9)
