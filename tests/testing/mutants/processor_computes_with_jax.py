"""The processor looks for placeholders with JAX: a program for each length of a prompt."""

import jax.numpy as jnp
import numpy as np
from right_model import IMAGE_TOKEN, build, expand_images

CLAUSE = "nothing compiles after the start"


def searched(ctx, inputs):
    found = jnp.asarray(np.asarray(inputs.prompt_token_ids)) == IMAGE_TOKEN
    assert int(found.sum()) == len(inputs.multi_modal_data.get("image", ()))
    return expand_images(ctx, inputs)


Model = build(processor=searched)
