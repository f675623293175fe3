import jax
import numpy as np
import pytest
from sampling_reference import row

from aphrodite_jax.errors import RequestError
from aphrodite_jax.sampling import (
    build_sampling_batch,
    check_sampling_params,
    is_plain_greedy,
    uses_history,
)
from aphrodite_jax.sampling.batch import BIAS_WIDTH, MAX_BANNED_TOKENS
from aphrodite_jax.sampling_params import MAX_LOGIT_BIAS, SamplingParams

V = 500


def build(*rows, num_rows=4, history_width=6):
    return build_sampling_batch(rows, num_rows=num_rows, vocab_size=V, history_width=history_width)


def test_values_and_dtypes_of_a_row_and_of_padding():
    batch = build(
        row(
            (1, 2, 3), (4, 4), seed=2**32 - 1, temperature=0.5, top_p=0.25, top_k=7, min_p=0.125,
            presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.25, logit_bias={9: -2.0, 3: 1.0},
        ),
        num_rows=2,
    )  # fmt: skip
    for name, value, padding, dtype in (
        ("temperature", 0.5, 0, np.float32),
        ("top_p", 0.25, 1, np.float32),
        ("top_k", 7, V, np.int32),
        ("min_p", 0.125, 0, np.float32),
        ("presence_penalty", 1.5, 0, np.float32),
        ("frequency_penalty", -0.5, 0, np.float32),
        ("repetition_penalty", 1.25, 1, np.float32),
        ("seed", 2**32 - 1, 0, np.uint32),
        ("step", 2, 0, np.int32),
    ):
        column = getattr(batch, name)
        assert column.dtype == dtype, name
        assert column.tolist() == [value, padding], name
    assert batch.prompt_tokens.tolist() == [[1, 2, 3, V, V, V], [V] * 6]
    assert batch.output_tokens.tolist() == [[4, 4, V, V, V, V], [V] * 6]
    assert batch.bias_ids[0, :3].tolist() == [3, 9, V]
    assert batch.bias_values[0, :3].tolist() == [1.0, -2.0, 0.0]
    assert (batch.bias_ids[1] == V).all()
    assert not batch.bias_values[1].any()


def test_shapes_depend_on_the_bucket_alone():
    shapes = [
        jax.tree.map(lambda a: (a.shape, a.dtype), batch)
        for batch in (
            build(),
            build(row(temperature=0.0)),
            build(*[row((5,) * 6, (6,) * 6, presence_penalty=1.0, logit_bias={1: 1.0})] * 4),
        )
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("top_k", [-1, 0, V, V + 1, 10**9])
def test_top_k_beyond_the_vocabulary_keeps_all(top_k):
    assert build(row(top_k=top_k)).top_k[0] == V


def test_history_is_kept_for_penalised_rows_alone_and_from_any_sequence():
    batch = build(
        row((1, 2), (3,)),
        row(np.array([1, 2]), [3], repetition_penalty=2.0),
        row((1, 2), (3,), frequency_penalty=0.1),
    )
    assert (batch.prompt_tokens[0] == V).all()
    assert (batch.output_tokens[0] == V).all()
    assert batch.prompt_tokens[1:3, :3].tolist() == [[1, 2, V]] * 2
    assert batch.output_tokens[1:3, :2].tolist() == [[3, V]] * 2
    build(row((1, 2), (3,)), history_width=0)


def test_ids_outside_the_vocabulary_name_no_token():
    batch = build(row((-1, 7, V + 3), (), presence_penalty=1.0, min_tokens=1, stop_token_ids=(-5, V, 2)))
    assert batch.prompt_tokens[0, :3].tolist() == [V, 7, V]
    assert batch.bias_ids[0, :3].tolist() == [V, V, 2]


def test_end_and_stop_tokens_are_banned_until_min_tokens():
    options = {"min_tokens": 2, "stop_token_ids": (7, 8), "logit_bias": {7: 3.0, 5: 1.0}}
    early, late = build(row((), (1,), end=(2, 7), **options)), build(row((), (1, 1), end=(2, 7), **options))
    bias = dict(zip(early.bias_ids[0].tolist(), early.bias_values[0].tolist(), strict=True))
    assert bias == {5: 1.0, 7: -np.inf, 2: -np.inf, 8: -np.inf, V: 0.0}
    bias = dict(zip(late.bias_ids[0].tolist(), late.bias_values[0].tolist(), strict=True))
    assert bias == {5: 1.0, 7: 3.0, V: 0.0}


def test_the_bias_width_holds_the_most_that_is_admitted():
    params = {
        "logit_bias": {i: 1.0 for i in range(MAX_LOGIT_BIAS)},
        "stop_token_ids": tuple(range(MAX_LOGIT_BIAS, MAX_LOGIT_BIAS + MAX_BANNED_TOKENS - 1)),
        "min_tokens": 1,
    }
    check_sampling_params(SamplingParams(**params), vocab_size=V, end_token_ids=(V - 1,))
    batch = build(row(end=(V - 1,), **params))
    assert (batch.bias_ids[0] < V).sum() == BIAS_WIDTH
    with pytest.raises(RequestError, match=rf"at most {MAX_BANNED_TOKENS} .* here are {MAX_BANNED_TOKENS + 1}"):
        check_sampling_params(SamplingParams(**params), vocab_size=V, end_token_ids=(V - 1, V - 2))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {V: 1.0}}, rf"logit_bias names the token ids \[{V}\].*0 to {V - 1}"),
        ({"logit_bias": {-1: 1.0, 3: 1.0}}, r"logit_bias names the token ids \[-1\]"),
        ({"stop_token_ids": (3, V + 7)}, rf"stop_token_ids names the token ids \[{V + 7}\]"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused_at_admission(params, message):
    with pytest.raises(RequestError, match=message):
        check_sampling_params(SamplingParams(**params), vocab_size=V, end_token_ids=())


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="3 requests do not fit in 2 rows"):
        build(*[row()] * 3, num_rows=2)
    with pytest.raises(ValueError, match="7 token ids do not fit in history_width 6"):
        build(row((1,) * 7, (), presence_penalty=1.0))


def test_extreme_options_stay_in_float32():
    batch = build(
        row((), (), temperature=1e300, top_p=1e-300, repetition_penalty=1e-300),
        row((), (), temperature=9.99999999e-6, repetition_penalty=1e300),
    )
    assert np.isfinite(batch.temperature).all()
    assert (batch.top_p > 0).all()
    assert (batch.repetition_penalty > 0).all()
    assert np.isfinite(batch.repetition_penalty).all()
    assert batch.temperature[1] == 0


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 4, "stop": "x", "stop_token_ids": (1,)}, True),
        ({"prompt_logprobs": 3}, True),
        ({"temperature": 0.5}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"logprobs": 0}, False),
        ({"min_tokens": 1}, False),
    ],
)
def test_which_requests_are_plain_greedy(params, plain):
    assert is_plain_greedy(SamplingParams(**{"temperature": 0.0, **params})) is plain


def test_which_requests_use_history():
    assert not uses_history(SamplingParams(logprobs=3, logit_bias={1: 1.0}))
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert uses_history(SamplingParams(**{name: 0.5}))
