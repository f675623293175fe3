"""A shape is declared, and memory planned for it, that no item has and that is larger than the dummy data's."""

import jax
from right_model import MOST, build, media_shapes

CLAUSE = "no declared shape needs more memory"


def and_one_that_never_comes(ctx):
    wide = {
        name: jax.ShapeDtypeStruct((1, 100 * MOST, *x.shape[2:]), x.dtype) for name, x in media_shapes(ctx)[-1].items()
    }
    return [*media_shapes(ctx), wide]


Model = build(shapes=and_one_that_never_comes)
