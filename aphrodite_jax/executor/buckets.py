"""The short list of shapes that the device programs are compiled for."""

import dataclasses

from aphrodite_jax.errors import ConfigError

__all__ = ["TILE_SIZE", "Buckets", "make_buckets", "round_up"]

TILE_SIZE = 16
"""Rows of a prefill tile; a request's chunk is padded to whole tiles (`kernels_pallas.paged_attention`)."""
MAX_ENCODE_ITEMS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes, ascending: tokens of a prefill step, requests of a decode step, items of an encode step."""

    prefill_tokens: tuple[int, ...]
    decode_requests: tuple[int, ...]
    encode_items: tuple[int, ...]

    def prefill_requests(self, tokens: int) -> int:
        """Requests that a prefill step of ``tokens`` has room for: each takes a tile at least; a decode bucket."""
        return round_up(min(max(1, tokens // TILE_SIZE), self.decode_requests[-1]), self.decode_requests)


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> Buckets:
    """Powers of two up to each maximum, the maximum itself at the end.

    Raises:
      ConfigError: the token budget is below one tile.
    """
    if max_num_batched_tokens < TILE_SIZE:
        raise ConfigError(f"max_num_batched_tokens must be at least {TILE_SIZE}, got {max_num_batched_tokens}")
    largest = max_num_batched_tokens // TILE_SIZE * TILE_SIZE
    return Buckets(
        prefill_tokens=_doubling(min(4 * TILE_SIZE, largest), largest),
        decode_requests=_doubling(1, max_num_seqs),
        encode_items=_doubling(1, min(MAX_ENCODE_ITEMS, max_num_seqs)),
    )


def round_up(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``size``."""
    return next(bucket for bucket in sizes if bucket >= size)


def _doubling(low: int, high: int) -> tuple[int, ...]:
    sizes = [low]
    while sizes[-1] < high:
        sizes.append(min(2 * sizes[-1], high))
    return tuple(sizes)
