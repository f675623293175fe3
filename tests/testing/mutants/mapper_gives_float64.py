"""The mapper gives float64, which JAX narrows in silence, or refuses."""

import numpy as np
from right_model import build, map_images

from aphrodite_jax.multimodal import MultiModalInputs

CLAUSE = "the mapper's arrays fit"


def wide(ctx, images):
    return MultiModalInputs({name: np.asarray(array, np.float64) for name, array in map_images(ctx, images).items()})


Model = build(mapper=wide)
