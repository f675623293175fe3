"""All images get as many tokens as the first."""

from right_model import IMAGE_TOKEN, build, num_strips

from aphrodite_jax.inputs import expand_items

CLAUSE = "each item has as many placeholder tokens"


def as_the_first(ctx, inputs):
    images = inputs.multi_modal_data.get("image", ())
    return expand_items(inputs, "image", IMAGE_TOKEN, [num_strips(images[0])] * len(images) if images else [])


Model = build(processor=as_the_first)
