import functools

import hypothesis
import jax
import numpy as np
import pytest
import sampling_reference as reference
from hypothesis import strategies as st
from sampling_reference import row

from aphrodite_jax.sampling import build_sampling_batch, sample, sample_greedy
from aphrodite_jax.sampling.candidates import keep_candidates
from aphrodite_jax.sampling.logits import apply_bias, apply_penalties, scale

V = 37
HISTORY = 8

run = jax.jit(sample, static_argnames="num_logprobs")
run_greedy = jax.jit(sample_greedy)
process = jax.jit(lambda logits, batch: apply_penalties(apply_bias(logits, batch), batch))
candidates = jax.jit(lambda logits, batch: keep_candidates(scale(logits, batch.temperature), batch))


def build(rows, num_rows=None, vocab_size=V):
    return build_sampling_batch(rows, num_rows=num_rows or len(rows), vocab_size=vocab_size, history_width=HISTORY)


def tokens(logits, rows, num_rows=None):
    padded = np.zeros((num_rows or len(rows), logits.shape[1]), np.float32)
    padded[: len(rows)] = logits
    batch = build(rows, num_rows, logits.shape[1])
    return np.asarray(run(padded, batch, num_logprobs=0).token_ids)[: len(rows)]


ids = st.integers(0, V - 1)
history = st.lists(ids, max_size=HISTORY)


@st.composite
def sampling_rows(draw, greedy=True):
    return row(
        draw(history),
        draw(history),
        draw(st.lists(ids, max_size=2)),
        draw(st.integers(0, 2**32 - 1)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5] if greedy else [0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([-1, 1, 2, 5, V, 1000])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3)),
        min_tokens=draw(st.sampled_from([0, 4])),
        stop_token_ids=draw(st.lists(ids, max_size=2)),
    )


@st.composite
def problems(draw, num_rows=6):
    """Logits [R, V], with ties in about half of the cases, and R rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(num_rows, V)) * draw(st.sampled_from([0.0, 0.5, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = np.round(logits)
    return logits.astype(np.float32), draw(st.lists(sampling_rows(), min_size=num_rows, max_size=num_rows))


@hypothesis.given(problems())
@hypothesis.settings(deadline=None, max_examples=60)
def test_processed_logits_equal_the_reference(problem):
    logits, rows = problem
    expected = [reference.processed_logits(z, r) for z, r in zip(logits, rows, strict=True)]
    np.testing.assert_allclose(process(logits, build(rows)), expected, rtol=1e-5, atol=1e-4)


@hypothesis.given(problems())
@hypothesis.settings(deadline=None, max_examples=60)
def test_candidates_equal_the_reference(problem):
    logits, rows = problem
    kept = np.isfinite(candidates(logits, build(rows)))
    for got, z, r in zip(kept, logits, rows, strict=True):
        options = {name: getattr(r.params, name) for name in ("top_k", "min_p")}
        options["temperature"] = max(r.params.temperature, 1e-5)
        z = z.astype(np.float64)
        # Where a sum of float32 stands within rounding of top_p, either answer is right.
        top_p, rounding = r.params.top_p, 1e-5 * (r.params.top_p < 1)
        least = reference.kept_tokens(z, top_p=top_p * (1 - rounding), **options)
        most = reference.kept_tokens(z, top_p=min(1.0, top_p * (1 + rounding)), **options)
        assert least <= set(np.flatnonzero(got).tolist()) <= most


@pytest.mark.parametrize("vocab_size", [1, 32, 33, 4097, 32_003])
def test_candidates_of_any_vocabulary(vocab_size):
    """Rows are added up in parts, whose sizes hang on it."""
    z = np.random.default_rng(vocab_size).normal(size=vocab_size).astype(np.float32)
    logits = np.stack([z, np.round(z), np.zeros_like(z), z * 1e4, np.where(z > 0, -np.inf, z)])
    logits[4, 0] = 0.0  # one at least that is not banned
    for top_k, top_p in ((50, 1.0), (-1, 0.9), (1000, 0.5), (-1, 0.999)):
        options = {"temperature": 1.0, "top_k": top_k, "min_p": 0.0}
        kept = candidates(logits, build([row(top_k=top_k, top_p=top_p)] * 5, vocab_size=vocab_size))
        for got, values in zip(np.isfinite(kept), logits.astype(np.float64), strict=True):
            rounding = 1e-5 * (top_p < 1)
            least = reference.kept_tokens(values, top_p=top_p * (1 - rounding), **options)
            most = reference.kept_tokens(values, top_p=min(1.0, top_p * (1 + rounding)), **options)
            assert least <= set(np.flatnonzero(got).tolist()) | set(np.flatnonzero(np.isneginf(values)).tolist())
            assert set(np.flatnonzero(got).tolist()) <= most


@hypothesis.given(problems())
@hypothesis.settings(deadline=None, max_examples=60)
def test_tokens_equal_the_reference(problem):
    logits, rows = problem
    for token, z, r in zip(tokens(logits, rows), logits, rows, strict=True):
        z, params = reference.processed_logits(z, r), r.params
        if params.temperature == 0:
            assert z[token] >= z.max() - 1e-4
            continue
        kept = reference.kept_tokens(
            z, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
        )
        score = z / params.temperature + reference.gumbel(r.seed, r.step, V)
        best = max(score[list(kept)])
        # The sampler's float32 may order two tokens within rounding of each other differently.
        assert score[token] >= best - 1e-3
        assert score[token] <= best + 1e-3 or token not in kept


@hypothesis.given(problems(), st.permutations(range(6)))
@hypothesis.settings(deadline=None, max_examples=60)
def test_a_rows_token_depends_on_neither_company_nor_place_nor_bucket(problem, permutation):
    logits, rows = problem
    together = tokens(logits, rows)
    alone = [tokens(logits[i : i + 1], rows[i : i + 1])[0] for i in range(6)]
    moved = tokens(logits[list(permutation)], [rows[i] for i in permutation], num_rows=16)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[list(permutation)], moved)


def test_invariance_holds_for_a_real_vocabulary():
    rng = np.random.default_rng(0)
    num_rows, vocab_size = 16, 32_003
    logits = rng.normal(size=(num_rows, vocab_size)).astype(np.float32) * 2
    rows = [
        row(
            seed=i,
            output=(i,) * (i % 4),
            temperature=0.5 + i / 8,
            top_p=0.8 + 0.2 * (i % 2),
            top_k=(i % 3) * 50,
        )
        for i in range(num_rows)
    ]
    together = tokens(logits, rows)
    for size in (1, 4):
        parts = [tokens(logits[i : i + size], rows[i : i + size]) for i in range(0, num_rows, size)]
        np.testing.assert_array_equal(together, np.concatenate(parts))
    assert len(set(together.tolist())) > num_rows // 2


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_the_draw_does_not_depend_on_the_default_generator(generator):
    logits = np.random.default_rng(1).normal(size=(4, V)).astype(np.float32)
    rows = [row(seed=i) for i in range(4)]
    expected = tokens(logits, rows)
    with jax.default_prng_impl(generator):
        jitted = functools.partial(jax.jit(sample, static_argnames="num_logprobs"), num_logprobs=0)
        np.testing.assert_array_equal(jitted(logits, build(rows)).token_ids, expected)


def test_seed_and_step_each_change_the_draw():
    logits = np.zeros((64, V), np.float32)
    by_seed = tokens(logits, [row(seed=i) for i in range(64)])
    by_step = tokens(np.zeros((8, V), np.float32), [row(output=(0,) * i) for i in range(8)])
    assert len(set(by_seed.tolist())) > 20
    assert len(set(by_step.tolist())) > 3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params):
    num_rows = 4096
    z = np.random.default_rng(5).normal(size=12).astype(np.float32) * 1.5
    logits = np.tile(z, (num_rows, 1))
    drawn = tokens(logits, [row(seed=1000 + i, **params) for i in range(num_rows)])
    full = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, **params}
    kept = sorted(reference.kept_tokens(z.astype(np.float64), **full))
    p = reference.probabilities(z[kept].astype(np.float64) / full["temperature"])
    counts = np.bincount(drawn, minlength=12)
    assert counts.sum() == counts[kept].sum()
    chi_square = ((counts[kept] - num_rows * p) ** 2 / (num_rows * p)).sum()
    # Wilson-Hilferty: the 99.9th percentile of chi square with d degrees of freedom; seeds are fixed.
    d = len(kept) - 1
    assert chi_square < d * (1 - 2 / (9 * d) + 3.09 * np.sqrt(2 / (9 * d))) ** 3


def test_frequencies_over_the_steps_of_one_seed():
    z = np.array([0.0, 1.0, 2.0], np.float32)
    batch = build([row(seed=3)] * 2048, vocab_size=3)
    batch = build_with_steps(batch, np.arange(2048))
    counts = np.bincount(run(np.tile(z, (2048, 1)), batch, num_logprobs=0).token_ids, minlength=3)
    np.testing.assert_allclose(counts / 2048, reference.probabilities(z), atol=0.035)


def build_with_steps(batch, steps):
    leaves = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return type(batch)(**{**leaves, "step": steps.astype(np.int32)})


def test_greedy_takes_the_lowest_of_equals_in_both_programs():
    logits = np.zeros((3, V), np.float32)
    logits[1, [9, 4, 30]] = 2.0
    logits[2] = -np.inf
    logits[2, [20, 11]] = -5.0
    rows = [row(temperature=0.0), row(temperature=0.0), row(temperature=9e-6)]
    assert tokens(logits, rows).tolist() == [0, 4, 11]
    assert run_greedy(logits).tolist() == [0, 4, 11]


@pytest.mark.parametrize("vocab_size", [160, 1024, 2048, 32003, 49280])
def test_greedy_takes_the_first_of_the_largest_in_any_vocabulary(vocab_size):
    """In one block, in several, and in a size that has no blocks; with ties within and between blocks."""
    rng = np.random.default_rng(vocab_size)
    logits = np.round(rng.normal(size=(12, vocab_size)), 1).astype(np.float32)
    logits[1] = -np.inf
    logits[2, : vocab_size // 2] = -np.inf
    logits[3] = 0.0
    logits[4, ::2] = -0.0
    logits[5, [vocab_size - 1, vocab_size // 3]] = 9.0
    logits[6, -1] = 9.0
    np.testing.assert_array_equal(run_greedy(logits), logits.argmax(axis=1))
    logits[7, 3] = np.nan
    assert 0 <= int(run_greedy(logits)[7]) < vocab_size


def test_both_programs_agree_on_plain_greedy_rows():
    logits = np.random.default_rng(2).normal(size=(8, V)).astype(np.float32)
    general = run(logits, build([row(temperature=0.0)] * 8), num_logprobs=0)
    np.testing.assert_array_equal(general.token_ids, run_greedy(logits))


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {}, {"top_k": 10**6}, {"top_p": 1e-30}, {"temperature": 1e30}, {"min_p": 1.0},
     {"temperature": float("inf"), "top_p": 0.5}, {"temperature": 1e-5}],
    ids=str,
)  # fmt: skip
def test_the_only_token_that_is_not_banned_is_taken(params):
    logits = np.random.default_rng(3).normal(size=(1, V)).astype(np.float32) * 100
    stop = tuple(t for t in range(V) if t != 17)
    assert tokens(logits, [row(min_tokens=1, max_tokens=9, stop_token_ids=stop, **params)]) == [17]


def test_everything_banned_gives_a_token_and_harms_no_other_row():
    logits = np.random.default_rng(4).normal(size=(3, V)).astype(np.float32)
    banned = {"min_tokens": 1, "stop_token_ids": tuple(range(V))}
    rows = [row(top_p=0.5, **banned), row(temperature=0.0, **banned), row(seed=5)]
    got = tokens(logits, rows)
    assert got[:2].tolist() == [0, 0]
    assert got[2] == tokens(logits[2:], rows[2:])[0]


def test_a_ban_outweighs_every_bias_and_penalty():
    logits = np.zeros((1, V), np.float32)
    options = {
        "logit_bias": {3: 100.0, 4: 50.0}, "stop_token_ids": (3,), "min_tokens": 2, "temperature": 0.0,
        "presence_penalty": -2.0, "frequency_penalty": -2.0, "repetition_penalty": 0.01,
    }  # fmt: skip
    assert tokens(logits, [row(output=(3,), **options)]) == [4]
    assert tokens(logits, [row(output=(3, 3), **options)]) == [3]


@pytest.mark.parametrize("params", [{"top_p": 1e-30}, {"top_k": 1}, {"top_k": 1, "top_p": 0.1}, {"top_p": 1e-300}])
def test_the_smallest_filters_are_greedy_even_among_equals(params):
    logits = np.zeros((32, V), np.float32)
    logits[:, [7, 21]] = 1.0
    assert set(tokens(logits, [row(seed=i, **params) for i in range(32)]).tolist()) == {7}


@pytest.mark.parametrize("penalty", [1e-30, 1e30, 1e300, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
def test_extreme_repetition_penalties_make_no_nan(penalty, temperature):
    logits = np.random.default_rng(6).normal(size=(1, V)).astype(np.float32) * 50
    options = {"repetition_penalty": penalty, "temperature": temperature}
    likely = int(logits.argmax())
    got = tokens(logits, [row((likely,), (), **options)])[0]
    assert (got == likely) == (penalty < 1)


def test_penalties_see_the_prompt_or_the_output_as_documented():
    logits = np.full((1, 6), 1.0, np.float32)
    got = process(logits, build([row((1, 1), (2, 2, 3), repetition_penalty=2.0)], vocab_size=6))
    np.testing.assert_allclose(got, [[1, 0.5, 0.5, 0.5, 1, 1]])
    got = process(logits, build([row((1, 1), (2, 2, 3), frequency_penalty=0.25)], vocab_size=6))
    np.testing.assert_allclose(got, [[1, 1, 0.5, 0.75, 1, 1]])
    got = process(logits, build([row((1, 1), (2, 2, 3), presence_penalty=0.25)], vocab_size=6))
    np.testing.assert_allclose(got, [[1, 1, 0.75, 0.75, 1, 1]])
