"""The mapper gives an array that __call__ has no parameter for."""

from right_model import build, map_images

from aphrodite_jax.multimodal import MultiModalInputs

CLAUSE = "the mapper's arrays fit"


def renamed(ctx, images):
    mapped = dict(map_images(ctx, images))
    return MultiModalInputs({"pixels": mapped.pop("pixel_values"), **mapped})


Model = build(mapper=renamed)
