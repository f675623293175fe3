"""What `LLM.capture` shows is what the model computes: against the engine's own answers, and Hugging Face's states."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from golden_files import media_of, read_golden

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.errors import RegistrationError, RequestError
from aphrodite_jax.modeling.layers.observer import Observer
from kernels_pallas.intervals import RowIntervals, to_mask

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_goldens.py"


def open_llm(directory, golden):
    return LLM(
        directory,
        dtype="float32",
        limit_mm_per_prompt=golden.media_limits,
        warm_up=False,
        show_progress=False,
    )


def prompt_of(golden):
    """The last of a golden, which has the most media."""
    prompt = golden.prompts[-1]
    return prompt, {"prompt_token_ids": prompt.prompt.tolist(), "multi_modal_data": media_of(prompt)}


@pytest.fixture(scope="module")
def golden():
    return read_golden("llava_clip_llama")


@pytest.fixture(scope="module")
def llm(golden, tmp_path_factory):
    return open_llm(golden.write_checkpoint(tmp_path_factory.mktemp("capture") / "llava"), golden)


def test_the_lens_of_the_last_layer_is_the_answer(llm, golden):
    prompt, request = prompt_of(golden)
    seen = llm.capture(request, prompt.tokens, logit_lens=[-1, 0], top_k=3)
    first = len(prompt.input_ids) - 1
    np.testing.assert_array_equal(seen.logit_lens[-1].token_ids[first:-1, 0], prompt.tokens)
    assert seen.logit_lens[-1].texts[first][0] == llm.tokenizer.decode([prompt.tokens[0]])
    assert not np.array_equal(seen.logit_lens[0].token_ids, seen.logit_lens[-1].token_ids)
    assert np.all(np.diff(seen.logit_lens[-1].probabilities, axis=1) <= 0)


def test_attention_keeps_to_the_mask_and_sums_to_one(llm, golden):
    prompt, request = prompt_of(golden)
    rows = np.arange(len(prompt.input_ids))
    seen = llm.capture(request, attention=[0, -1], attention_rows=rows)
    intervals = llm.explain(request).intervals["full"]
    for weights in seen.attention.values():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert not np.any(weights[:, ~to_mask(intervals, len(rows))])
    last = seen.attention_map(1, layer=-1)
    assert last.shape == (4, 4)
    np.testing.assert_allclose(last.ravel(), seen.attention[-1][:, -1].mean(0)[seen.item_tokens[1]])


def test_embeddings_given_by_the_user_are_seen(llm, golden):
    rows = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    request = {"prompt": "w5 <image> w6", "multi_modal_data": {"image": rows}}
    seen = llm.capture(request, hidden_states=[0])
    np.testing.assert_allclose(seen.hidden_states[0][seen.item_tokens[0]], rows, atol=1e-6)


def test_the_engine_is_left_as_it_was(llm, golden):
    _, request = prompt_of(golden)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    before = llm.generate(request, params, use_tqdm=False)[0].outputs[0].token_ids
    programs = llm.stats()["programs"]
    llm.capture(request, hidden_states=[1])
    assert llm.stats()["programs"] == programs
    assert llm.generate(request, params, use_tqdm=False)[0].outputs[0].token_ids == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to capture"),
        ({"attention": [9]}, "attention are from -2 to 1 here, got 9"),
        ({"hidden_states": [3]}, "hidden_states are from -3 to 2 here, got 3"),
        ({"attention": [0], "attention_rows": [3]}, "attention_rows are from -2 to 1"),
        ({"logit_lens": [0], "top_k": 0}, "top_k must be from 1 to 160"),
        ({"hidden_states": [0], "continuation": [160]}, "outside the model's vocabulary of 160"),
        ({"hidden_states": [0], "continuation": [5] * 300}, "have 302 tokens"),
    ],
)
def test_what_is_not_there_is_refused(llm, options, message):
    with pytest.raises(RequestError, match=message):
        llm.capture({"prompt_token_ids": [5, 6]}, **options)


def test_a_layer_that_was_not_captured_has_no_map(llm, golden):
    seen = llm.capture(prompt_of(golden)[1], attention=[0])
    with pytest.raises(RequestError, match=r"layer -1 was not captured; there are \[0\]"):
        seen.attention_map()
    with pytest.raises(RequestError, match="16 rows, which do not fill 3 x 1: give its grid"):
        seen.attention_map(layer=0, grid=(3, 1))


@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "qwen3_vl", "llava_clip_mistral"])
def test_states_and_attention_are_hugging_face_s(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference models of Hugging Face need torch")
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    make_goldens = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_goldens)
    golden, case = read_golden(name), make_goldens.all_cases()[name]
    directory = golden.write_checkpoint(tmp_path / name, layout="memory")
    prompt, request = prompt_of(golden)
    expanded, keywords = case.reference_inputs(
        directory, prompt.prompt.tolist(), list(prompt.images), list(prompt.videos)
    )
    with torch.no_grad():
        told = make_goldens.load_reference(directory)(
            input_ids=torch.tensor([expanded]), output_hidden_states=True, output_attentions=True, **keywords
        )
    layers = range(len(told.attentions))
    seen = open_llm(directory, golden).capture(
        request, hidden_states=[0, *layers], attention=layers, attention_rows=np.arange(len(expanded))
    )
    rows = np.arange(len(expanded))
    if name == "qwen3_vl":  # where features are added to rows of media behind a layer, the reference's state is without
        rows = np.setdiff1d(rows, np.concatenate(seen.item_tokens))
    for layer in layers:  # the reference's last state is behind the last norm
        states = told.hidden_states[layer][0].numpy()
        np.testing.assert_allclose(seen.hidden_states[layer][rows], states[rows], atol=2e-4)
        np.testing.assert_allclose(seen.attention[layer], told.attentions[layer][0].numpy(), atol=2e-4)


def test_layers_that_hide_are_refused():
    observer = Observer()
    with pytest.raises(RegistrationError, match="0 attended, 0 were called so"):
        observer.check()
    rows = RowIntervals(np.zeros(1, np.int32), np.ones(1, np.int32))
    observer.see_attention(np.ones((1, 1, 4)), np.ones((1, 1, 4)), rows, scale=None, soft_cap=None)
    with pytest.raises(RegistrationError, match="1 attended, 0 were called so"):
        observer.check()
