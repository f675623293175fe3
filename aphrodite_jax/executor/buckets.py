"""The short list of shapes that the device programs are compiled for."""

import dataclasses

from aphrodite_jax.errors import ConfigError

__all__ = ["TILE_SIZE", "Buckets", "make_buckets", "round_down", "round_up"]

TILE_SIZE = 16
"""Rows of a prefill tile; a request's chunk is padded to whole tiles (`kernels_pallas.paged_attention`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes, ascending: rows of prompts in a step, rows of decode, items of an encode step.

    A step has one of ``decode_requests`` rows of decode and no prompts, or one of ``prefill_tokens`` rows of prompts
    and either no rows of decode or one of ``joined_requests``: a few programs where all pairs would be many. Where all
    requests are greedy and none has a prompt to compute, one program does all, and its sizes, ``greedy_requests``, are
    finer.
    """

    prefill_tokens: tuple[int, ...]
    decode_requests: tuple[int, ...]
    joined_requests: tuple[int, ...]
    greedy_requests: tuple[int, ...]
    encode_items: tuple[int, ...]

    def prefill_requests(self, tokens: int) -> int:
        """Requests that a prefill step of ``tokens`` has room for: each takes a tile at least; a decode bucket."""
        return round_up(min(max(1, tokens // TILE_SIZE), self.decode_requests[-1]), self.decode_requests)

    def shape(self, num_decode: int, num_prefill_rows: int) -> tuple[int, int, int]:
        """Of the batch that holds so many rows: rows of decode, rows of prompts (whole tiles), requests."""
        if not num_prefill_rows:
            rows = round_up(num_decode, self.decode_requests)
            return rows, 0, rows
        tokens = round_up(num_prefill_rows, self.prefill_tokens)
        if not num_decode:
            return 0, tokens, self.prefill_requests(tokens)
        rows = round_up(num_decode, self.joined_requests)
        requests = min(rows + self.prefill_requests(tokens), self.decode_requests[-1])
        return rows, tokens, round_up(requests, self.decode_requests)

    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """All that `shape` may give."""
        decode = [self.shape(n, 0) for n in self.decode_requests]
        return (*decode, *(self.shape(n, tokens) for tokens in self.prefill_tokens for n in (0, *self.joined_requests)))


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int, max_encode_items: int = 8) -> Buckets:
    """Powers of two up to each maximum, the maximum itself at the end; greedy requests in finer steps from 16 on.

    Beside prompts there is room for all rows of decode, or, of many, for a quarter.

    Raises:
      ConfigError: the token budget is below one tile.
    """
    if max_num_batched_tokens < TILE_SIZE:
        raise ConfigError(f"max_num_batched_tokens must be at least {TILE_SIZE}, got {max_num_batched_tokens}")
    largest = max_num_batched_tokens // TILE_SIZE * TILE_SIZE
    return Buckets(
        prefill_tokens=_doubling(min(4 * TILE_SIZE, largest), largest),
        decode_requests=_doubling(1, max_num_seqs),
        joined_requests=(max_num_seqs // 4, max_num_seqs) if max_num_seqs >= 32 else (max_num_seqs,),
        greedy_requests=_fine(max_num_seqs),
        encode_items=_doubling(1, min(max_encode_items, max_num_seqs)),
    )


def round_up(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``size``."""
    return next(bucket for bucket in sizes if bucket >= size)


def round_down(size: int, sizes: tuple[int, ...]) -> int:
    """The largest bucket that ``size`` fills."""
    return max(bucket for bucket in sizes if bucket <= size)


def _doubling(low: int, high: int) -> tuple[int, ...]:
    sizes = [low]
    while sizes[-1] < high:
        sizes.append(min(2 * sizes[-1], high))
    return tuple(sizes)


def _fine(high: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, then four to the octave (20, 24, 28, 32, 40, ...), so that a fifth is wasted at most."""
    sizes = [1]
    while sizes[-1] < high:
        last = sizes[-1]
        step = last if last < 16 else 2 ** (last.bit_length() - 3)
        sizes.append(min(last + step, high))
    return tuple(sizes)
