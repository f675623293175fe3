"""The mapper takes a mean with JAX: a program for each size of a picture, compiled while requests wait."""

import jax.numpy as jnp
import numpy as np
from right_model import build, num_strips, strips_of

from aphrodite_jax.multimodal import MultiModalInputs

CLAUSE = "nothing compiles after the start"


def brighter(image):
    return strips_of(image) + np.asarray(jnp.mean(np.asarray(image, np.float32))) / 255


def brightened(ctx, images):
    arrays = [{"pixel_values": brighter(image), "is_strip": np.ones(num_strips(image), np.float32)} for image in images]
    return MultiModalInputs.batch(list(map(MultiModalInputs, arrays)))


Model = build(mapper=brightened)
