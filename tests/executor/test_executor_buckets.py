"""Buckets hold every step that the scheduler may plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.buckets import TILE_SIZE, make_buckets, round_up


@given(st.integers(1, 300), st.integers(TILE_SIZE, 5000))
def test_every_step_has_a_bucket(max_num_seqs, max_num_batched_tokens):
    buckets = make_buckets(max_num_seqs, max_num_batched_tokens)
    for sizes in (buckets.prefill_tokens, buckets.decode_requests, buckets.greedy_requests, buckets.encode_items):
        assert sizes == tuple(sorted(set(sizes)))
    assert buckets.decode_requests[-1] == buckets.greedy_requests[-1] == max_num_seqs
    assert max_num_batched_tokens - TILE_SIZE < buckets.prefill_tokens[-1] <= max_num_batched_tokens
    for tokens in buckets.prefill_tokens:
        assert tokens % TILE_SIZE == 0
        assert min(tokens // TILE_SIZE, max_num_seqs) <= buckets.prefill_requests(tokens) <= max_num_seqs
        assert buckets.prefill_requests(tokens) in buckets.decode_requests


@given(st.integers(1, 300), st.integers(TILE_SIZE, 5000), st.data())
def test_a_batch_has_one_of_the_declared_shapes_and_fits(max_num_seqs, max_num_batched_tokens, data):
    buckets = make_buckets(max_num_seqs, max_num_batched_tokens)
    num_prefill = data.draw(st.integers(0, min(max_num_seqs, buckets.prefill_tokens[-1] // TILE_SIZE)))
    num_decode = data.draw(st.integers(int(not num_prefill), max_num_seqs - num_prefill) if num_prefill < max_num_seqs
                           else st.just(0))  # fmt: skip
    rows = num_prefill * TILE_SIZE
    decode, prefill, requests = shape = buckets.shape(num_decode, rows)
    assert shape in buckets.shapes()
    assert decode >= num_decode
    assert prefill >= rows
    assert prefill % TILE_SIZE == 0
    assert requests >= num_decode + num_prefill
    assert (decode > 0, prefill > 0) == (num_decode > 0, num_prefill > 0)


@given(st.integers(1, 300), st.data())
def test_rounding_up_wastes_less_than_half(max_num_seqs, data):
    buckets = make_buckets(max_num_seqs, 64)
    sizes = buckets.decode_requests
    size = data.draw(st.integers(1, max_num_seqs))
    assert size <= round_up(size, sizes) < 2 * size or round_up(size, sizes) == size
    assert size <= 16 or round_up(size, buckets.greedy_requests) <= 1.25 * size


def test_a_budget_below_a_tile():
    with pytest.raises(ConfigError, match="at least 16, got 15"):
        make_buckets(4, TILE_SIZE - 1)
