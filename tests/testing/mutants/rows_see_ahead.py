"""Every row gets a little of the row behind it, which a causal mask does not let it see."""

import jax.numpy as jnp
from right_model import build

CLAUSE = "a row moves with what mask_specs let it see"
Model = build(before=lambda model, input_ids, embeds: embeds + 0.1 * jnp.roll(embeds, -1, axis=0))
