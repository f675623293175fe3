"""Buckets hold every step that the scheduler may plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.buckets import TILE_SIZE, make_buckets, round_up


@given(st.integers(1, 300), st.integers(TILE_SIZE, 5000))
def test_every_step_has_a_bucket(max_num_seqs, max_num_batched_tokens):
    buckets = make_buckets(max_num_seqs, max_num_batched_tokens)
    for sizes in (buckets.prefill_tokens, buckets.decode_requests, buckets.encode_items):
        assert sizes == tuple(sorted(set(sizes)))
    assert buckets.decode_requests[-1] == max_num_seqs
    assert max_num_batched_tokens - TILE_SIZE < buckets.prefill_tokens[-1] <= max_num_batched_tokens
    for tokens in buckets.prefill_tokens:
        assert tokens % TILE_SIZE == 0
        assert min(tokens // TILE_SIZE, max_num_seqs) <= buckets.prefill_requests(tokens) <= max_num_seqs
        assert buckets.prefill_requests(tokens) in buckets.decode_requests


@given(st.integers(1, 300), st.data())
def test_rounding_up_wastes_less_than_half(max_num_seqs, data):
    sizes = make_buckets(max_num_seqs, 64).decode_requests
    size = data.draw(st.integers(1, max_num_seqs))
    assert size <= round_up(size, sizes) < 2 * size or round_up(size, sizes) == size


def test_a_budget_below_a_tile():
    with pytest.raises(ConfigError, match="at least 16, got 15"):
        make_buckets(4, TILE_SIZE - 1)
