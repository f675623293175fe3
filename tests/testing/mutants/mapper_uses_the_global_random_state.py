"""The mapper draws from NumPy's global generator: what others draw next depends on how many images came by."""

import numpy as np
from right_model import build, map_images

CLAUSE = "the mapper is pure"


def drawing(ctx, images):
    np.random.random()
    return map_images(ctx, images)


Model = build(mapper=drawing)
