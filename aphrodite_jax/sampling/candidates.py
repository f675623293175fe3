"""Which tokens may be drawn: top-k, then top-p, then min-p.

Tokens are ordered by logit, and by id where logits are equal; each filter keeps a beginning of that order: no
more than ``top_k`` tokens, and the likeliest one always. Where a beginning ends is found bit by bit, in a pass over
the vocabulary for each bit of a logit: a sort would take many more. Every sum has a fixed order or is of integers,
so a row's result does not depend on the rows beside it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aphrodite_jax.sampling.batch import SamplingBatch

__all__ = ["keep_candidates"]

KEY_BITS = 31
"""Of a logit; the logits of a row have one sign, and order as these bits do."""
FOLD, LANES = 32, 128
"""A row is added up in so many parts at a time, each a multiple of a TPU's lanes."""


class _End(NamedTuple):
    """Where a beginning of the order ends: at the tokens of one key, of which the first ``places`` belong to it."""

    key: Int[Array, " R"]
    places: Int[Array, " R"]


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
    keys = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)  # the likeliest has the lowest
    end = _end_of_top_k(keys, top_k)
    end = jax.lax.cond(jnp.any(top_p < 1), _end_of_top_p, lambda keys, end, top_p: end, keys, end, top_p)
    before, equal = keys < end.key[:, None], keys == end.key[:, None]
    equal = jax.lax.cond(
        jnp.any(_count(equal) > end.places), _first_ids, lambda equal, places: equal, equal, end.places
    )
    return jnp.where(before | equal, scaled, -jnp.inf)


def _end_of_top_k(keys: Int[Array, "R V"], top_k: Int[Array, " R"]) -> _End:
    key, before = _reach(top_k, lambda key: _count(keys < key[:, None]), KEY_BITS)
    return _End(key, top_k - before)


def _end_of_top_p(keys: Int[Array, "R V"], end: _End, top_p: Float[Array, " R"]) -> _End:
    """That of the shortest beginning with ``top_p`` of the weight of the beginning up to ``end``."""

    def weight_before(key: Int[Array, " R"]) -> Float[Array, " R"]:
        return _sum_in_order([jnp.where(part < key[:, None], _weight(part), 0.0) for part in _parts(keys)])

    of_all = weight_before(end.key) + end.places.astype(jnp.float32) * _weight(end.key)
    needed = top_p * of_all
    key, before = _reach(needed, weight_before, KEY_BITS)
    key = jnp.minimum(key, end.key)
    of_each = jnp.maximum(_weight(key), jnp.finfo(jnp.float32).tiny)
    most = jnp.where(key == end.key, end.places, keys.shape[1]).astype(jnp.float32)
    places = jnp.clip(jnp.ceil((needed - before) / of_each), 1, most).astype(jnp.int32)
    return _End(*(jnp.where(top_p < 1, found, given) for found, given in zip((key, places), end, strict=True)))


def _first_ids(found: Bool[Array, "R V"], places: Int[Array, " R"]) -> Bool[Array, "R V"]:
    """The first ``places`` of each row that are True."""
    ids = jnp.arange(found.shape[1], dtype=jnp.int32)[None]
    last, _ = _reach(places, lambda end: _count(found & (ids < end[:, None])), found.shape[1].bit_length())
    return found & (ids <= last[:, None])


def _reach(needed: Array, amount_before: Callable[[Array], Array], num_bits: int) -> tuple[Int[Array, " R"], Array]:
    """The number with which an amount that grows with the numbers is reached, and how much of it is before that.

    Where all numbers of ``num_bits`` bits don't reach it, the largest of them.
    """

    def try_bit(i, found):
        number, before = found
        larger = number | jnp.left_shift(1, num_bits - 1 - i)
        amount = amount_before(larger)
        return jnp.where(amount < needed, larger, number), jnp.where(amount < needed, amount, before)

    return jax.lax.fori_loop(0, num_bits, try_bit, (jnp.zeros(needed.shape, jnp.int32), jnp.zeros_like(needed)))


def _weight(keys: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Probability, relative to the largest."""
    return jnp.exp(-jax.lax.bitcast_convert_type(keys, jnp.float32))


def _count(found: Bool[Array, "R V"]) -> Int[Array, " R"]:
    return found.sum(axis=1, dtype=jnp.int32)


def _sum_in_order(parts: list[Float[Array, "R part"]]) -> Float[Array, " R"]:
    """Sums of rows, given in parts of equal size, in an order that is the same for every R.

    The order in which a reduction adds is the backend's choice; that of additions that are written out is not.
    """
    total = sum(parts[1:], parts[0])
    return total[:, 0] if total.shape[1] == 1 else _sum_in_order(_parts(total))


def _parts(x: Array) -> list[Array]:
    """The row in at most ``FOLD`` parts; the last one is filled up with what weighs nothing, as a key or a sum."""
    size = -(-x.shape[1] // FOLD)
    if size > LANES:
        size += -size % LANES
    filling = 0.0 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=filling)
    return [x[:, begin : begin + size] for begin in range(0, x.shape[1], size)]
