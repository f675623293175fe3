"""A look inside: what becomes of a request (`Explanation`), and what a model computes on the way (`Capture`)."""

from aphrodite_jax.inspection.capture import Capture, TopTokens, capture
from aphrodite_jax.inspection.explanation import ExplainedItem, Explanation, explain

__all__ = ["Capture", "ExplainedItem", "Explanation", "TopTokens", "capture", "explain"]
