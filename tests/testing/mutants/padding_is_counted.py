"""Strips alone are summed up, and divided by the number of all rows: zeros in the padding, and yet another mean."""

import jax.numpy as jnp
from right_model import build

CLAUSE = "what pad_media adds changes none"


def counted(projector, pixels, is_strip):
    mean = (pixels * is_strip[..., None]).mean(axis=1, keepdims=True)
    return projector(jnp.concatenate([pixels, jnp.broadcast_to(mean, pixels.shape)], axis=-1))


Model = build(rows=counted)
