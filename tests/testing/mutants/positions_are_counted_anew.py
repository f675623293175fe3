"""Rows are numbered within the call, not within their prompt: right for a whole prompt, wrong for a chunk."""

import jax.numpy as jnp
from right_model import build

CLAUSE = "answers are the same in chunks"
Model = build(place=lambda positions: jnp.arange(len(positions), dtype=positions.dtype))
