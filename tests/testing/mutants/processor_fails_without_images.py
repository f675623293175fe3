"""The processor takes for granted that there is an image."""

from right_model import build, expand_images

CLAUSE = "a prompt of text alone"


def demanding(ctx, inputs):
    inputs.multi_modal_data["image"][0]
    return expand_images(ctx, inputs)


Model = build(processor=demanding)
