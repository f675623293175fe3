"""Log-probabilities of tokens under the model's own distribution.

They are of the raw logits: before bias, penalties, temperature and filters (vLLM's default, "raw_logprobs"),
so they say what the model believes, not what the sampler did.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["TokenLogprobs", "prompt_logprobs", "token_logprobs"]


class TokenLogprobs(NamedTuple):
    """Natural logs for R tokens.

    Attributes:
      ranks: from 1; of equal logits the lower id ranks first.
      top_ids, top_logprobs: the k likeliest tokens in the order of their ranks.
    """

    logprobs: Float[Array, " R"]
    ranks: Int[Array, " R"]
    top_ids: Int[Array, "R k"]
    top_logprobs: Float[Array, "R k"]


def token_logprobs(logits: Float[Array, "R V"], token_ids: Int[Array, " R"], *, num_logprobs: int) -> TokenLogprobs:
    """Log-probability and rank of one token a row, and the ``num_logprobs`` (at most V) likeliest."""
    logits = jnp.where(logits == 0, 0.0, logits)  # top_k would put 0 before -0
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    ahead = (logits > chosen) | ((logits == chosen) & (ids < token_ids[:, None]))
    top, top_ids = jax.lax.top_k(logits, min(num_logprobs, logits.shape[1]))
    norm = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    return TokenLogprobs(
        (chosen - norm)[:, 0], 1 + ahead.sum(axis=1, dtype=jnp.int32), top_ids.astype(jnp.int32), top - norm
    )


def prompt_logprobs(logits: Float[Array, "T V"], target_ids: Int[Array, " T"], *, num_logprobs: int) -> TokenLogprobs:
    """The same for prompt rows: ``target_ids[i]`` is the prompt's token after row i."""
    return token_logprobs(logits, target_ids, num_logprobs=num_logprobs)
