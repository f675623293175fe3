"""Tiles of scores on TPU: what one block of keys adds to some query rows, in two arrangements.

A *chain* is one head with some rows, and what keeps the matrix units busy is that the chains of a block are unrolled
side by side: the scores of the next chain are made while the softmax of this one is worked on.

    down     rows in sublanes, keys in lanes     best where heads fill the matrix unit (v5e, head size 128 and up)
    across   keys in sublanes, rows in lanes     best elsewhere: row statistics need no cross-lane step

Online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; blocks and rescaling as in FlashAttention-2,
https://arxiv.org/abs/2307.08691. Powers are of 2, log2(e) being a factor of the scores.
"""

# Starred arguments, and refs that only some variants of a kernel have, are beyond the type checker.
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalIterable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.platform import tpu_reciprocal

__all__ = ["LANES", "LOWEST", "Across", "Blocks", "Down", "Problem", "Refs", "scratch_shapes", "visit"]

LANES = 128
LOWEST = -1e30
"""Score of a key that a row does not see: finite, so that a row that has seen no key yet makes no NaN."""


class Blocks(NamedTuple):
    """How a problem is cut.

    Attributes:
      across: the arrangement of a tile.
      rows, parts: rows of a chain in free blocks, and chains of one head in a program: it owns rows * parts rows.
      keys: keys of a free block.
      edge_rows, edge_keys: rows and keys of a piece of an edge; they divide ``rows`` and ``keys``.
      heads: query heads of a program at most.
      step: keys of one matrix product; divides ``edge_keys``. Where one block holds all keys the last takes the rest.
      resident: keys of one key head that are in VMEM at a time, at most.
    """

    across: bool
    rows: int
    parts: int
    keys: int
    edge_rows: int
    edge_keys: int
    heads: int
    step: int
    resident: int

    @property
    def owned(self) -> int:
        """Query rows of a program."""
        return self.rows * self.parts


class Problem(NamedTuple):
    """Static facts of one call.

    Attributes:
      heads, kv_heads: query and key heads of a program.
      head_dim: as stored; a multiple of `LANES` where ``flat``.
      flat: whether rows stand in sublanes and heads in lanes, or the other way round.
      sole: number of keys where one block holds them all, so that nothing is carried from block to block and a block's
        output is written at once; else None. Across only.
    """

    blocks: Blocks
    heads: int
    kv_heads: int
    head_dim: int
    flat: bool
    soft_cap: float | None
    precision: jax.lax.Precision | None
    sole: int | None = None


def _product(a, b, contract_a: int, contract_b: int, precision):
    numbers = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _reciprocal(x, dtype):
    """``1 / x``, exact where the result keeps float32; else an estimate and a step of Newton's method."""
    if dtype == jnp.float32:
        return 1 / x
    estimate = tpu_reciprocal()(x, approx=True)
    return estimate * (2 - x * estimate)


def _decayed(old, decay):
    """``old * decay``, and 0 where the decay is: what a row held before its first key may be anything."""
    return jnp.where(decay == 0, 0, old * decay)


class Refs(NamedTuple):
    """The arrays of a program.

    Attributes:
      start, stop: intervals; across ``[pieces, 1, rows]``, down ``[rows, 1]``.
      q, out: ``[rows, heads * H]`` where flat, else ``[heads * H, rows]``.
      k, v: key head and keys (`pl.ds`) to ``[keys, H]``; where not flat, v gives ``[H, keys]``.
      lse: log-sums ``[heads, rows]``, or None.
      maximum, total, values, tiles, limits: scratch, see `scratch_shapes`.
      only: rows ``[first, last)`` that see anything, the others being none of a piece's business; None for all.
    """

    start: jax.Array
    stop: jax.Array
    q: jax.Array
    k: Callable
    v: Callable
    out: jax.Array
    lse: jax.Array | None
    maximum: jax.Array
    total: jax.Array
    values: jax.Array
    tiles: jax.Array
    limits: jax.Array | None
    only: tuple | None = None

    def stop_of(self, stop, first_row, axis: int):
        """``stop``, and 0 for rows that see nothing; rows of the program from ``first_row`` on stand along an axis."""
        if self.only is None:
            return stop
        row = first_row + jax.lax.broadcasted_iota(jnp.int32, stop.shape, axis)
        return jnp.where((row >= self.only[0]) & (row < self.only[1]), stop, 0)


class Across:
    """Keys in sublanes and rows in lanes; a row's statistics are one lane of ``[1, rows]``."""

    def __init__(self, problem: Problem, refs: Refs):
        self.p, self.r = problem, refs

    def _head(self, h):
        return slice(h * self.p.head_dim, (h + 1) * self.p.head_dim)

    def _kv_head(self, h):
        return h * self.p.kv_heads // self.p.heads

    def limits(self, piece):
        """Intervals ``[1, rows]`` of an edge piece."""
        return self.r.start[piece], self.r.stop_of(self.r.stop[piece], piece * self.p.blocks.edge_rows, 1)

    def prepare(self):
        """Make what `limits` needs, once a program."""

    def scores(self, rows, h, keys):
        """A tile of scores of one head, for the rows and keys given."""
        n = self._kv_head(h)
        if self.p.flat:
            return _product(self.r.k(n, keys), self.r.q[rows, self._head(h)], 1, 1, self.p.precision)
        return _product(self.r.k(n, keys), self.r.q[self._head(h), rows], 1, 0, self.p.precision)

    def masked(self, tile, first_key, limits):
        """The tile, `LOWEST` where a row does not see a key."""
        start, stop = limits
        key = first_key + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
        return jnp.where((key >= start) & (key < stop), tile, LOWEST)

    def put(self, slot, at, count, tile):
        """Keep a tile; its maxima, folded as far as is cheap."""
        self.r.tiles[slot, at : at + count, : tile.shape[1]] = tile
        return jnp.max(tile.reshape(count // 8, 8, -1), axis=0)

    def take(self, slot, at, count, num_rows):
        """A kept tile."""
        return self.r.tiles[slot, at : at + count, :num_rows]

    def settle(self, tops, rows, h):
        """Rows' new maxima, and the factor on what they had."""
        top = jnp.max(functools.reduce(jnp.maximum, tops), axis=0, keepdims=True)
        if self.p.sole is not None:
            return top, None
        old = self.r.maximum[h, :, rows]
        new = jnp.maximum(old, top)
        self.r.maximum[h, :, rows] = new
        return new, jnp.exp2(old - new)

    def weigh(self, tile, maximum, keys, h):
        """Weights' folded sums, and the values that they weigh."""
        weights = jnp.exp2(tile - maximum)
        total = jnp.sum(weights.reshape(tile.shape[0] // 8, 8, -1), axis=0)
        v = self.r.v(self._kv_head(h), keys)
        return total, _product(v, weights.astype(v.dtype), 0 if self.p.flat else 1, 0, self.p.precision)

    def add(self, rows, h, decay, total, values):
        """Take a block's sums and values in."""
        self.r.total[h, :, rows] = _decayed(self.r.total[h, :, rows], decay) + total
        self.r.values[h, :, rows] = _decayed(self.r.values[h, :, rows], decay) + values

    def finish(self, piece, rows, h):
        """Write a head's output, and leave its maxima as the next program wants them."""
        state = self.r.maximum[h, :, rows], self.r.total[h, :, rows], self.r.values[h, :, rows]
        self.write(self.limits(piece), rows, h, *state)
        self.r.maximum[h, :, rows] = jnp.full((1, rows.size), LOWEST)

    def write(self, limits, rows, h, maximum, total, values):
        """Write a head's output; without ``limits`` every row sees something."""
        total = jnp.sum(total, axis=0, keepdims=True)
        out = values * _reciprocal(total, self.r.out.dtype)
        lse = (maximum + jnp.log2(total)) * math.log(2)
        if limits is not None:
            start, stop = limits
            out, lse = jnp.where(stop > start, out, 0), jnp.where(stop > start, lse, -jnp.inf)
        if self.p.flat:
            self.r.out[rows, self._head(h)] = out.T.astype(self.r.out.dtype)
        else:
            self.r.out[self._head(h), rows] = out.astype(self.r.out.dtype)
        if self.r.lse is not None:
            self.r.lse[h : h + 1, rows] = lse

    def write_nothing(self, rows):
        """Write the output of rows that see nothing."""
        if self.p.flat:
            self.r.out[rows, :] = jnp.zeros((rows.size, self.r.out.shape[1]), self.r.out.dtype)
        else:
            self.r.out[:, rows] = jnp.zeros((self.r.out.shape[0], rows.size), self.r.out.dtype)
        if self.r.lse is not None:
            self.r.lse[:, rows] = jnp.full((self.p.heads, rows.size), -jnp.inf)


class Down:
    """Rows in sublanes and keys in lanes; a row's statistics are all lanes of ``[rows, LANES]``. Flat layout only."""

    def __init__(self, problem: Problem, refs: Refs):
        self.p, self.r = problem, refs

    def _head(self, h):
        return slice(h * self.p.head_dim, (h + 1) * self.p.head_dim)

    def _kv_head(self, h):
        return h * self.p.kv_heads // self.p.heads

    def _wide(self, x, lanes):
        return x if lanes == LANES else jnp.tile(x, (1, lanes // LANES))

    def _fold(self, function, tile):
        return functools.reduce(function, [tile[:, n : n + LANES] for n in range(0, tile.shape[1], LANES)])

    def prepare(self):
        """Intervals to all lanes, once a program."""
        for n, ref in enumerate((self.r.start, self.r.stop)):
            self.r.limits[n] = jnp.broadcast_to(ref[...], (self.p.blocks.owned, LANES))

    def limits(self, piece):
        """Intervals of an edge piece, to compare with."""
        rows = self.p.blocks.edge_rows
        at = pl.ds(pl.multiple_of(piece * rows, rows), rows)
        return self.r.limits[0, at], self.r.stop_of(self.r.limits[1, at], piece * rows, 0)

    def scores(self, rows, h, keys):
        """A tile of scores of one head, for the rows and keys given."""
        return _product(self.r.q[rows, self._head(h)], self.r.k(self._kv_head(h), keys), 1, 1, self.p.precision)

    def masked(self, tile, first_key, limits):
        """The tile, `LOWEST` where a row does not see a key."""
        start, stop = (x if isinstance(x, int) else self._wide(x, tile.shape[1]) for x in limits)
        key = first_key + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
        return jnp.where((key >= start) & (key < stop), tile, LOWEST)

    def put(self, slot, at, count, tile):
        """Keep a tile; its maxima, folded as far as is cheap."""
        self.r.tiles[slot, : tile.shape[0], at : at + count] = tile
        return self._fold(jnp.maximum, tile)

    def take(self, slot, at, count, num_rows):
        """A kept tile."""
        return self.r.tiles[slot, :num_rows, at : at + count]

    def settle(self, tops, rows, h):
        """Rows' new maxima, and the factor on what they had."""
        top = jnp.max(functools.reduce(jnp.maximum, tops), axis=1, keepdims=True)
        old = self.r.maximum[h, rows]
        new = jnp.maximum(old, top)
        self.r.maximum[h, rows] = new
        return new, jnp.exp2(old - new)

    def weigh(self, tile, maximum, keys, h):
        """Weights' folded sums, and the values that they weigh."""
        weights = jnp.exp2(tile - self._wide(maximum, tile.shape[1]))
        v = self.r.v(self._kv_head(h), keys)
        return self._fold(jnp.add, weights), _product(weights.astype(v.dtype), v, 1, 0, self.p.precision)

    def add(self, rows, h, decay, total, values):
        """Take a block's sums and values in."""
        self.r.total[h, rows] = _decayed(self.r.total[h, rows], decay) + total
        self.r.values[h, rows] = _decayed(self.r.values[h, rows], self._wide(decay, self.p.head_dim)) + values

    def finish(self, piece, rows, h):
        """Write a head's output, and leave its maxima as the next program wants them."""
        start, stop = self.limits(piece)
        occupied = stop > start
        total = self._row_sums(self.r.total[h, rows], h)
        share = self._wide(_reciprocal(total, self.r.out.dtype), self.p.head_dim)
        out = jnp.where(self._wide(occupied, self.p.head_dim), self.r.values[h, rows] * share, 0)
        self.r.out[rows, self._head(h)] = out.astype(self.r.out.dtype)
        if self.r.lse is not None:
            lse = (self.r.maximum[h, rows] + jnp.log2(total)) * math.log(2)
            self.r.lse[h : h + 1, rows] = jnp.where(occupied, lse, -jnp.inf).T[:1]
        self.r.maximum[h, rows] = jnp.full((rows.size, LANES), LOWEST)

    def _row_sums(self, total, h):
        """Sums over lanes, in all lanes; every second head's on the matrix units, which idle when this is asked."""
        if h % 2 == 0 or self.r.out.dtype == jnp.float32:
            return jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), total.shape)
        bits = jax.lax.bitcast_convert_type(total, jnp.int32)
        high = jax.lax.bitcast_convert_type(bits & -(1 << 16), jnp.float32)  # what bfloat16 holds of it
        ones = jnp.ones((LANES, LANES), jnp.bfloat16)
        return sum(_product(part.astype(jnp.bfloat16), ones, 1, 0, None) for part in (high, total - high))


def visit(arrangement, problem: Problem, base, first_key, num_keys: int, chains, piece=None):
    """Take in ``num_keys`` keys for chains ``(rows, head)``, all of as many rows; with a mask where ``piece`` is given.

    ``base`` is the first key in VMEM.
    """
    spans = [(at, min(problem.blocks.step, num_keys - at)) for at in range(0, num_keys, problem.blocks.step)]
    num_rows = chains[0][0].size
    limits = None if piece is None else arrangement.limits(piece)

    def keys(at, count):
        if problem.sole is not None:  # known to the compiler, so that lengths need no alignment
            return pl.ds(at, count)
        return pl.ds(pl.multiple_of(first_key - base + at, problem.blocks.step), count)

    def score(chain, at, count):
        tile = arrangement.scores(*chains[chain], keys(at, count))
        if problem.soft_cap is not None:
            tile = jnp.tanh(tile) * (problem.soft_cap * math.log2(math.e))
        if limits is not None:
            tile = arrangement.masked(tile, first_key + at, limits)
        elif problem.sole is not None and at + count > problem.sole:
            tile = arrangement.masked(tile, at, (0, problem.sole))  # padding
        return arrangement.put(chain % 2, at, count, tile)

    tops = [score(0, *span) for span in spans]
    for chain, (rows, head) in enumerate(chains):
        maximum, decay = arrangement.settle(tops, rows, head)
        tops, parts = [], []
        for at, count in spans:
            if chain + 1 < len(chains):
                tops.append(score(chain + 1, at, count))
            tile = arrangement.take(chain % 2, at, count, num_rows)
            parts.append(arrangement.weigh(tile, maximum, keys(at, count), head))
        total, values = (functools.reduce(jnp.add, x) for x in zip(*parts, strict=True))
        if problem.sole is None:
            arrangement.add(rows, head, decay, total, values)
        else:
            arrangement.write(limits, rows, head, maximum, total, values)


def scratch_shapes(problem: Problem) -> list:
    """VMEM scratch of a program, in the order of `Refs`: row maxima and sums, weighted values, two tiles of scores."""
    blocks, heads, H = problem.blocks, problem.heads, problem.head_dim
    rows = blocks.owned
    if blocks.across:
        state = [(heads, 1, rows), (heads, 8, rows), (heads, H, rows), (2, blocks.keys, blocks.rows)]
        return [pltpu.VMEM(shape, jnp.float32) for shape in state]
    state = [(heads, rows, LANES), (heads, rows, LANES), (heads, rows, H), (2, blocks.rows, blocks.keys)]
    return [*(pltpu.VMEM(shape, jnp.float32) for shape in state), pltpu.VMEM((2, rows, LANES), jnp.int32)]
