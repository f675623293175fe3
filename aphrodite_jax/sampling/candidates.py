"""Which tokens may be drawn: top-k, then top-p, then min-p.

Tokens are ordered by logit, and by id where logits are equal; each filter keeps a beginning of that order: no
more than ``top_k`` tokens, and the likeliest one always. Every sum has a fixed order or is of integers, so a
row's result does not depend on the rows beside it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aphrodite_jax.sampling.batch import SamplingBatch

__all__ = ["keep_candidates"]


def keep_candidates(scaled: Float[Array, "R V"], batch: SamplingBatch) -> Float[Array, "R V"]:
    """Scaled logits (largest 0) with -inf for tokens that top-k, then top-p, then min-p leave out.

    top_p: the shortest beginning of the order whose probabilities, of those that top-k left, reach ``top_p``.
    min_p: a token's probability is at least ``min_p`` times the largest.
    """
    filtered = jnp.any((batch.top_k < scaled.shape[1]) | (batch.top_p < 1))
    kept = jax.lax.cond(
        filtered,
        _keep_top,
        lambda scaled, *_: scaled,
        scaled,
        batch.top_k,
        batch.top_p,
    )
    return jnp.where(kept >= jnp.log(batch.min_p)[:, None], kept, -jnp.inf)


def _keep_top(scaled: Float[Array, "R V"], top_k: Int[Array, " R"], top_p: Float[Array, " R"]) -> Float[Array, "R V"]:
    # Floats of one sign order as their bits do, and integers sort six times faster than floats on CPU.
    keys = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)
    ordered = jax.lax.sort(keys, dimension=1, is_stable=False)  # the likeliest first
    num_kept = _num_kept(jax.lax.bitcast_convert_type(ordered, jnp.float32), top_k, top_p)
    last = jnp.take_along_axis(ordered, num_kept[:, None] - 1, axis=1)
    # Of the tokens equal to the last one kept, those with the lowest ids fill the places that are left.
    better, equal = keys < last, keys == last
    places = num_kept - better.sum(axis=1, dtype=jnp.int32)
    kept = better | (equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= places[:, None]))
    return jnp.where(kept, scaled, -jnp.inf)


def _num_kept(cost: Float[Array, "R V"], top_k: Int[Array, " R"], top_p: Float[Array, " R"]) -> Int[Array, " R"]:
    """Length of the order's beginning that is kept, for costs (minus scaled logits) that ascend."""
    in_top_k = jnp.arange(cost.shape[1])[None] < top_k[:, None]
    weights = jnp.where(in_top_k, jnp.exp(-cost), 0.0)
    mass = _running_sums(weights)
    mass_before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    needed = (in_top_k & (mass_before < top_p[:, None] * mass[:, -1:])).sum(axis=1, dtype=jnp.int32)
    return jnp.where(top_p < 1, jnp.maximum(needed, 1), top_k)


def _running_sums(values: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """Inclusive sums along each row, in an order that is the same for every R.

    Not cumsum: the order of its additions is the backend's choice. By doubling (Hillis and Steele, 1986): after
    round i an element is the sum of the 2**(i + 1) up to it. A loop compiles twenty times faster than
    `jax.lax.associative_scan`, and the sort before it takes most of the time.
    """
    length = values.shape[1]

    def double(i, sums):
        before = jnp.pad(sums, ((0, 0), (length, 0)))
        return sums + jax.lax.dynamic_slice_in_dim(before, length - jnp.left_shift(1, i), length, axis=1)

    return jax.lax.fori_loop(0, (length - 1).bit_length(), double, values)
