"""A token less than rows for pictures of several strips, as where a class token is counted wrongly."""

from right_model import IMAGE_TOKEN, build, num_strips

from aphrodite_jax.inputs import expand_items

CLAUSE = "each item has as many placeholder tokens"


def one_too_few(ctx, inputs):
    lengths = [max(num_strips(image) - 1, 1) for image in inputs.multi_modal_data.get("image", ())]
    return expand_items(inputs, "image", IMAGE_TOKEN, lengths)


Model = build(processor=one_too_few)
