import hypothesis
import jax
import numpy as np
import sampling_reference as reference
from hypothesis import strategies as st

from aphrodite_jax.sampling import SamplingRow, build_sampling_batch, prompt_logprobs, sample
from aphrodite_jax.sampling_params import SamplingParams

V = 41
T = 5

run = jax.jit(prompt_logprobs, static_argnames="num_logprobs")


@hypothesis.given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([0, 1, 20, V, V + 9]))
@hypothesis.settings(deadline=None, max_examples=40)
def test_logprobs_ranks_and_alternatives_equal_the_reference(seed, ties, k):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, V)).astype(np.float32) * 4
    logits = np.round(logits) if ties else logits
    logits[:, 3] = -np.inf
    targets = rng.integers(0, V, T).astype(np.int32)
    got = run(logits, targets, num_logprobs=k)
    assert got.top_ids.shape == got.top_logprobs.shape == (T, min(k, V))
    for i in range(T):
        expected, order = reference.logprobs(logits[i]), reference.order(logits[i])
        np.testing.assert_allclose(got.logprobs[i], expected[targets[i]], atol=1e-5)
        assert got.ranks[i] == 1 + order.index(targets[i])
        assert got.top_ids[i].tolist() == order[:k]
        np.testing.assert_allclose(got.top_logprobs[i], expected[order[:k]], atol=1e-5)


def test_sampled_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    options = {"logit_bias": {7: 50.0}, "repetition_penalty": 1.5, "temperature": 2.0, "top_k": 3}
    rows = [
        SamplingRow(
            params=SamplingParams(**options),
            seed=i,
            prompt_token_ids=(1, 2),
            output_token_ids=(),
            end_token_ids=(),
        )
        for i in range(3)
    ]
    batch = build_sampling_batch(rows, num_rows=3, vocab_size=V, history_width=4)
    got = jax.jit(sample, static_argnames="num_logprobs")(logits, batch, num_logprobs=20)
    assert got.token_ids.tolist() == [7, 7, 7]
    for a, b in zip(got[1:], run(logits, got.token_ids, num_logprobs=20), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_token_of_probability_zero_has_minus_infinity_and_the_last_rank():
    logits = np.array([[0.0, -np.inf, 1.0]], np.float32)
    got = run(logits, np.array([1], np.int32), num_logprobs=3)
    assert got.logprobs.tolist() == [-np.inf]
    assert got.ranks.tolist() == [3]
    assert got.top_ids.tolist() == [[2, 0, 1]]
