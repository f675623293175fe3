"""The loss of a batch: how surprised the model is by the answers."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from aphrodite_jax.tuning.packing import Batch

__all__ = ["answer_loss"]


def answer_loss(model: Any, batch: Batch) -> Float[Array, ""]:
    """Mean cross entropy of the tokens of the answers, in nats; float32, differentiable by the model's parameters.

    It equals the loss of Hugging Face's model for ``labels`` that are -100 but for the answers'. Logits are computed
    for the rows that count alone.
    """
    embeds = model.embed_input_ids(batch.input_ids)
    rows = [item for arrays in batch.media for items in model.embed_multimodal(**arrays).values() for item in items]
    rows += [] if batch.embeds is None else [batch.embeds]
    if rows:
        encoded = jnp.concatenate([x.astype(embeds.dtype) for x in rows])
        is_row = batch.media_rows >= 0
        embeds = jnp.where(is_row[:, None], encoded[jnp.maximum(batch.media_rows, 0)], embeds)
    hidden, _ = model(batch.input_ids, batch.positions, None, batch.metadata, inputs_embeds=embeds)
    logits = model.compute_logits(hidden[batch.answer_rows])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(jnp.where(batch.counts, losses, 0)) / jnp.sum(batch.counts, dtype=jnp.float32)
