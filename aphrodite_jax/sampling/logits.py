"""What changes the logits before a token is taken: bias, penalties, temperature."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aphrodite_jax.sampling.batch import MIN_TEMPERATURE, AnyArray, SamplingBatch

__all__ = ["apply_bias", "apply_penalties", "scale"]

HIGHEST = 1e30
"""Cap of a penalised logit: a repetition penalty near 0 would make it infinite, and differences of it NaN."""


def apply_bias(logits: Float[Array, "R V"], batch: SamplingBatch) -> Float[Array, "R V"]:
    """Add each row's bias; -inf bans a token whatever follows."""
    any_bias = jnp.any(jnp.asarray(batch.bias_ids) < logits.shape[1])
    return jax.lax.cond(any_bias, _biased, lambda logits, _: logits, logits, batch)


def apply_penalties(logits: Float[Array, "R V"], batch: SamplingBatch) -> Float[Array, "R V"]:
    """Repetition penalty (CTRL, https://arxiv.org/abs/1909.05858, eq. 2), then frequency, then presence.

    Repetition looks at the prompt and the output, the other two at the output alone, as vLLM does. Rows with
    neutral penalties come back as they were, bit for bit.
    """
    return jax.lax.cond(_any_penalty(batch), _penalised, lambda logits, _: logits, logits, batch)


def scale(logits: Float[Array, "R V"], temperature: Float[AnyArray, " R"]) -> Float[Array, "R V"]:
    """Logits over temperature, shifted so that the row's largest is 0; banned tokens stay at -inf."""
    largest = logits.max(axis=-1, keepdims=True)
    largest = jnp.where(jnp.isneginf(largest), 0.0, largest)  # all banned: -inf minus -inf is NaN
    scaled = (logits - largest) / jnp.maximum(temperature, MIN_TEMPERATURE)[:, None]
    return jnp.where(jnp.isneginf(logits), -jnp.inf, scaled)


def _biased(logits: Float[Array, "R V"], batch: SamplingBatch) -> Float[Array, "R V"]:
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, batch.bias_ids].add(batch.bias_values, mode="drop")


def _any_penalty(batch: SamplingBatch) -> Array:
    neutral = (batch.presence_penalty == 0) & (batch.frequency_penalty == 0) & (batch.repetition_penalty == 1)
    return jnp.any(~neutral)


def _penalised(logits: Float[Array, "R V"], batch: SamplingBatch) -> Float[Array, "R V"]:
    counts = _count(batch.output_tokens, logits.shape[1])
    seen = (counts > 0) | (_count(batch.prompt_tokens, logits.shape[1]) > 0)
    factor = batch.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, jnp.minimum(logits / factor, HIGHEST), logits * factor)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - batch.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return logits - batch.presence_penalty[:, None] * (counts > 0).astype(jnp.float32)


def _count(tokens: Int[AnyArray, "R history"], vocab_size: int) -> Int[Array, "R V"]:
    """How often each token occurs in its row; padding (V) is dropped."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), jnp.int32).at[rows, tokens].add(1, mode="drop")
