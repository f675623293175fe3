"""The mean is taken over padding too."""

import jax.numpy as jnp
from right_model import build, rows_of

CLAUSE = "what pad_media adds changes none"
Model = build(rows=lambda projector, pixels, is_strip: rows_of(projector, pixels, jnp.ones_like(is_strip)))
