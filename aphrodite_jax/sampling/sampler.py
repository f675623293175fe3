"""One token a request: the general program, and the cheap one for plain greedy requests.

The order: bias and bans, penalties, temperature, top-k, top-p, min-p, draw. It is that of Hugging Face's
``generate``; vLLM's second engine takes min-p before top-k.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aphrodite_jax.sampling.batch import MIN_TEMPERATURE, AnyArray, SamplingBatch
from aphrodite_jax.sampling.candidates import keep_candidates
from aphrodite_jax.sampling.logits import apply_bias, apply_penalties, scale
from aphrodite_jax.sampling.logprobs import token_logprobs

__all__ = ["SampledTokens", "sample", "sample_greedy"]

LEAST_BLOCK, MOST_BLOCK = 64, 1024


class SampledTokens(NamedTuple):
    """The tokens taken, and what `TokenLogprobs` tells of them."""

    token_ids: Int[Array, " R"]
    logprobs: Float[Array, " R"]
    ranks: Int[Array, " R"]
    top_ids: Int[Array, "R k"]
    top_logprobs: Float[Array, "R k"]


def sample(logits: Float[Array, "R V"], batch: SamplingBatch, *, num_logprobs: int) -> SampledTokens:
    """Take each row's next token by its own options.

    A row's token depends on its logits and options alone: not on the other rows, its place, or R. Greedy rows
    take the likeliest token, of equals the lowest id. Where everything is banned, token 0.

    Args:
      logits: float32, finite or -inf.
      num_logprobs: static; k of the result is this or V, if that is smaller.
    """
    processed = apply_penalties(apply_bias(logits, batch), batch)
    greedy_ids = _argmax(processed)
    is_random = batch.temperature >= MIN_TEMPERATURE
    token_ids = jax.lax.cond(
        is_random.any(),
        lambda: jnp.where(is_random, _draw(processed, batch), greedy_ids),
        lambda: greedy_ids,
    )
    return SampledTokens(token_ids, *token_logprobs(logits, token_ids, num_logprobs=num_logprobs))


def sample_greedy(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Each row's likeliest token, of equals the lowest id, for rows that are all `is_plain_greedy`."""
    return _argmax(logits)


def _draw(logits: Float[Array, "R V"], batch: SamplingBatch) -> Int[Array, " R"]:
    """A draw from the candidates' softmax by the Gumbel-max trick (https://arxiv.org/abs/1411.0030)."""
    candidates = keep_candidates(scale(logits, batch.temperature), batch)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(batch.seed, batch.step, logits.shape[1])
    return _argmax(candidates + noise)


def _gumbel(seed: AnyArray, step: AnyArray, vocab_size: int) -> Float[Array, " V"]:
    # The generator is named: with another one set as JAX's default, vmap would change a row's numbers.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)


def _argmax(values: Float[Array, "R V"]) -> Int[Array, " R"]:
    return jax.lax.platform_dependent(values, cpu=_argmax_in_blocks, default=_plain_argmax)


def _plain_argmax(values):
    return jnp.argmax(values, axis=1).astype(jnp.int32)


def _argmax_in_blocks(values):
    """The same where XLA takes the largest value of a row six times faster than its place.

    The first block that holds the row's largest value holds it first: its place is looked for in that block alone.
    """
    R, V = values.shape
    size = max((size for size in range(LEAST_BLOCK, MOST_BLOCK + 1) if V % size == 0), default=0)
    if size == 0 or size == V:
        return _plain_argmax(values)
    of_blocks = values.reshape(R, V // size, size).max(axis=2)
    largest = of_blocks.max(axis=1, keepdims=True)
    block = _first(of_blocks == largest)
    rows = values.reshape(R * (V // size), size)[jnp.arange(R, dtype=jnp.int32) * (V // size) + block]
    return block * size + _first(rows == largest)


def _first(found):
    """Index of the first True of each row ``[R, n]``; the last index where there is none (NaN equals nothing)."""
    n = found.shape[1]
    return jnp.where(found, jnp.arange(n, dtype=jnp.int32)[None], n - 1).min(axis=1)
