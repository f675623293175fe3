"""The mapper adds noise, so that equal pictures become different arrays."""

import numpy as np
from right_model import build, map_images

from aphrodite_jax.multimodal import MultiModalInputs

CLAUSE = "the mapper is pure"


def noisy(ctx, images):
    mapped = dict(map_images(ctx, images))
    noise = np.random.default_rng().normal(size=mapped["pixel_values"].shape)
    return MultiModalInputs(mapped | {"pixel_values": mapped["pixel_values"] + noise.astype(np.float32)})


Model = build(mapper=noisy)
