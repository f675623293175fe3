"""The runner's paged, ragged, padded programs give what one plain call of the model gives."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from hypothesis import strategies as st

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.errors import ConfigError, RecompilationError
from aphrodite_jax.executor.batch import Rows
from aphrodite_jax.executor.model_runner import ModelRunner
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.models.mistral import MistralForCausalLM
from kernels_pallas.intervals import RowIntervals, bidirectional_spans, causal, ends_cleanly

CONFIG = transformers.MistralConfig(
    architectures=["MistralForCausalLM"], vocab_size=96, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    sliding_window=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return MistralForCausalLM(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))


def make_runner(model, directory, **options):
    CONFIG.save_pretrained(directory)
    options = dict(max_num_seqs=4, max_num_batched_tokens=64, on_recompile="raise", show_progress=False) | options
    return ModelRunner(
        model, ModelConfig(model=directory), EngineConfig(**options), media_budget=0, max_num_batched_tokens=64
    )


@pytest.fixture(scope="module")
def runner(model, tmp_path_factory):
    runner = make_runner(model, tmp_path_factory.mktemp("mistral"), page_size=8)
    runner.warm_up(show_progress=False)
    return runner


@pytest.fixture(scope="module")
def runner_of_small_pages(model, tmp_path_factory):
    return make_runner(model, tmp_path_factory.mktemp("mistral"), page_size=3)


LONGEST = 64


@nnx.jit
def _plain(model, tokens, start, stop):
    """One call with no pages, padded to one length with rows that see nothing."""
    metadata = AttentionMetadata(intervals={"full": RowIntervals(start, stop)})
    hidden, _ = model(tokens, jnp.arange(LONGEST), None, metadata)
    return model.compute_logits(hidden)


def plain_logits(model, tokens, whole=None):
    """Of every row; ``whole`` in place of the model's own mask."""
    if whole is None:
        whole = causal(len(tokens), window=CONFIG.sliding_window)
    padded = [np.pad(np.asarray(x, np.int32), (0, LONGEST - len(tokens))) for x in (tokens, *whole)]
    return np.asarray(_plain(model, *padded))[: len(tokens)]


def rows(tokens, begin, end, pages, slot=-1, whole=None):
    if whole is None:
        whole = causal(len(tokens), window=CONFIG.sliding_window)
    return Rows(
        token_ids=tokens[begin:end],
        start=begin,
        prompt_length=len(tokens),
        intervals={"full": RowIntervals(whole.start[begin:end], whole.stop[begin:end])},
        pages=np.asarray(pages, np.int32),
        slot=slot,
    )


@pytest.mark.once
def test_ragged_prefill_then_decode_equals_one_plain_call(model, runner):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 96, n).astype(np.int32) for n in (37, 9))
    pages_a, pages_b = [7, 2, 9, 4, 11], [3, 5]
    logits, _, offsets = runner.forward([], [rows(a, 0, 20, pages_a), rows(b, 0, 8, pages_b)])
    assert offsets.tolist() == [0, 32]
    np.testing.assert_allclose(logits[1], plain_logits(model, b)[7], atol=1e-5)
    logits, _, _ = runner.forward([rows(b, 8, 9, pages_b)], [rows(a, 20, 36, pages_a)])  # both in one batch
    np.testing.assert_allclose(logits[0], plain_logits(model, b)[8], atol=1e-5)
    np.testing.assert_allclose(logits[1], plain_logits(model, a)[35], atol=1e-5)
    logits, _, _ = runner.forward([rows(a, 36, 37, pages_a), rows(b, 8, 9, pages_b)], [])
    np.testing.assert_allclose(logits[0], plain_logits(model, a)[36], atol=1e-5)
    np.testing.assert_allclose(logits[1], plain_logits(model, b)[8], atol=1e-5)
    assert runner.programs.late_compiles == 0


@st.composite
def cut_prompts(draw):
    """A prompt's row intervals, with a window and spans, and where its chunks end: nowhere that a row sees past."""
    length = draw(st.integers(2, 60))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
    spans = [span for span in itertools.pairwise(cuts) if draw(st.booleans())]
    whole = bidirectional_spans(causal(length, window=draw(st.sampled_from([None, 1, 7, 20]))), spans)
    clean = (np.flatnonzero(ends_cleanly(whole.stop)) + 1).tolist()
    ends = sorted({*draw(st.sets(st.sampled_from(clean))), length})
    return whole, ends


@hypothesis.given(st.lists(cut_prompts(), min_size=1, max_size=3), st.sampled_from(["runner", "runner_of_small_pages"]),
                  st.integers(0, 2**16))  # fmt: skip
@hypothesis.settings(
    deadline=None, max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@pytest.mark.once
def test_any_chunks_give_the_logits_of_none(model, request, prompts, name, seed):
    """Chunks of several requests side by side, in pages in random order, against one plain call for each."""
    runner = request.getfixturevalue(name)
    rng = np.random.default_rng(seed)
    order = rng.permutation(runner.num_pages)
    waiting = []
    for whole, ends in prompts:
        tokens = rng.integers(0, 96, len(whole.start)).astype(np.int32)
        pages, order = np.split(order, [-(-len(tokens) // runner.page_size)])
        wanted = plain_logits(model, tokens, whole)
        chunks = [rows(tokens, a, b, pages, whole=whole) for a, b in itertools.pairwise([0, *ends])]
        waiting.append([(chunk, wanted[chunk.start + len(chunk) - 1]) for chunk in chunks])
    while any(waiting):
        step, room = [], 64
        for chunks in waiting:
            if chunks and -(-len(chunks[0][0]) // 16) * 16 <= room:
                room -= -(-len(chunks[0][0]) // 16) * 16
                step.append(chunks.pop(0))
        decode, prefill = ([x for x in step if (len(x[0]) == 1) == one] for one in (True, False))
        logits, _, _ = runner.forward([x for x, _ in decode], [x for x, _ in prefill])
        for row, (_, wanted) in enumerate([*decode, *prefill]):
            np.testing.assert_allclose(logits[row], wanted, atol=2e-5)


def test_decode_goes_on_with_the_tokens_on_the_device(model, runner):
    """Greedy tokens: by one plain call for each; by the sampler and then several steps in one program."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 96, n).astype(np.int32) for n in (21, 5)]  # the window is 20
    pages, slots = [np.array([7, 2, 9, 4, 11]), np.array([3, 5])], [2, 0]
    wanted = []
    for prompt in prompts:
        tokens = prompt
        for _ in range(6):
            tokens = np.append(tokens, plain_logits(model, tokens)[-1].argmax()).astype(np.int32)
        wanted.append(tokens[len(prompt) :].tolist())
    whole = [rows(p, 0, len(p), held, slot) for p, held, slot in zip(prompts, pages, slots, strict=True)]
    logits, _, _ = runner.forward([], whole)
    first, details = runner.sample(logits, np.array([*slots, 4, 4], np.int32), None)
    assert details is None
    chosen = [np.asarray(first)[None, :2]]
    positions = np.array([len(p) for p in prompts])
    for steps in (3, 1, 1):
        tokens = runner.decode(slots, positions, np.zeros_like(slots), pages, steps)
        chosen.append(np.asarray(tokens)[:steps, :2])
        positions = positions + steps
    assert np.concatenate(chosen).T.tolist() == wanted
    assert runner.programs.late_compiles == 0


def test_a_shape_outside_the_buckets_is_an_error_after_warm_up(runner):
    with pytest.raises(RecompilationError, match="sample_greedy"):
        runner.sample(jnp.zeros((3, 96)), np.zeros(3, np.int32), None)


def test_prompt_logprobs_are_log_softmax_of_the_plain_logits(model, runner):
    tokens = np.arange(30, dtype=np.int32)
    _, hidden, _ = runner.forward([], [rows(tokens, 0, 30, [1, 2, 3, 4])])
    result = runner.prompt_logprobs(hidden, np.arange(29), tokens[1:])
    logits = plain_logits(model, tokens)[:29].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.logprobs, expected[np.arange(29), tokens[1:]], atol=1e-5)
    np.testing.assert_array_equal(result.ranks, 1 + (expected > expected[np.arange(29), tokens[1:]][:, None]).sum(1))


def test_the_memory_table_counts_what_is_allocated(runner, model):
    budget = runner.memory_budget()
    assert budget.weights == sum(x.nbytes for x in jnp_leaves(model))
    assert budget.kv_pages == runner.num_pages * 2 * 8 * 16 * 4 * 2  # heads, page, key and value, bytes, layers
    assert budget.forward > 0
    assert "KV pages" in str(budget)


def jnp_leaves(model):
    return jax.tree.leaves(nnx.state(model))


def test_a_cache_too_small_for_one_request_is_refused_with_the_numbers(model, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"one request of max_model_len 128 needs .* MiB"):
        ModelRunner(
            model, ModelConfig(model=tmp_path), EngineConfig(kv_cache_memory="4KiB"), media_budget=0,
            max_num_batched_tokens=64,
        )  # fmt: skip
