"""Hugging Face's stored answers through the whole engine: pages, chunked prefill, batches, encoder cache."""

import jax
import numpy as np
import pytest
from golden_files import media_of, read_golden

from aphrodite_jax import LLM, SamplingParams

CHUNK = 32
"""Prompt tokens of a step: some prompts fit in one, some take two or three."""
PAGE_SIZE = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
GREEDY_WITH_PROMPT = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, prompt_logprobs=0)


def make_llm(directory, **options):
    return LLM(
        model=directory,
        dtype="float32",
        **{"max_model_len": 128, "max_num_batched_tokens": CHUNK} | options,
        max_num_seqs=4,
        page_size=PAGE_SIZE,
        warm_up=False,  # only what these prompts need is compiled
        show_progress=False,
    )


def page_bytes(config):
    """Bytes of one page of float32 keys and values over all layers."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"] * 2 * PAGE_SIZE * config["num_key_value_heads"] * head_dim * 4


def request(prompt):
    return {"prompt_token_ids": prompt.prompt.tolist(), "multi_modal_data": media_of(prompt)}


def generate(llm, prompts, params=GREEDY):
    return llm.generate([request(prompt) for prompt in prompts], params, on_error="raise", use_tqdm=False)


def check_answer(output, prompt):
    assert output.prompt_token_ids == tuple(prompt.input_ids.tolist())
    assert output.outputs[0].token_ids == tuple(prompt.tokens.tolist())
    assert output.outputs[0].finish_reason == "length"
    told = [info.modality for info in output.media]
    assert sorted(told) == ["image"] * len(prompt.images) + ["video"] * len(prompt.videos)
    assert all(info.num_rows <= info.num_tokens for info in output.media)


def check_prompt_logprobs(output, prompt):
    targets = prompt.input_ids[1:]
    expected = np.asarray(jax.nn.log_softmax(prompt.logits))[np.arange(len(targets)), targets]
    first, *rest = output.prompt_logprobs
    actual = [entry[int(token)].logprob for entry, token in zip(rest, targets, strict=True)]
    assert first is None
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("tower", "text"), [("clip", "llama"), ("siglip", "mistral"), ("clip", "qwen2")])
@pytest.mark.once
def test_llava_alone_and_in_a_batch(tmp_path, tower, text):
    """Text only, one image and three: one after another; then together and in another order.

    Over SigLIP the pages are too few for the batch, so that sequences lose theirs and are computed again.
    """
    golden = read_golden(f"llava_{tower}_{text}")
    few_pages = {"kv_cache_memory": 18 * page_bytes(golden.config["text_config"])} if tower == "siglip" else {}
    llm = make_llm(golden.write_checkpoint(tmp_path), limit_mm_per_prompt={"image": 3}, **few_pages)
    assert max(len(prompt.input_ids) for prompt in golden.prompts) > CHUNK
    for prompt in golden.prompts:
        [output] = generate(llm, [prompt], GREEDY_WITH_PROMPT)
        check_answer(output, prompt)
        check_prompt_logprobs(output, prompt)
    assert llm.engine.scheduler.num_preemptions == 0
    prompts = [*golden.prompts[::-1], golden.prompts[1]]
    for output, prompt in zip(generate(llm, prompts), prompts, strict=True):
        check_answer(output, prompt)
    assert (llm.engine.scheduler.num_preemptions > 0) == (tower == "siglip")


SEE_AHEAD = ("gemma3", "paligemma")
ONE_OF_EACH = ("gemma3_short_window", "idefics3", "llava_onevision", "paligemma2", "qwen3_vl")
"""Spans within windows, text between rows, videos of tiles, prefix-LM, positions on axes with features for layers.

That the engine agrees with a plain call of the model, which is compared with the reference for all goldens, is asked of
every family by `tests/testing/test_families.py`.
"""


@pytest.mark.once
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_media_of_any_shape_alone_cached_and_in_a_batch(tmp_path, name):
    """Text only, one item, several of other sizes and shapes: in chunks; from pages; together in another order."""
    golden = read_golden(name)
    options = {"limit_mm_per_prompt": golden.media_limits, "max_model_len": None}
    if name.startswith(SEE_AHEAD):
        options["max_num_batched_tokens"] = 96  # what sees ahead must be computed in one step
    llm = make_llm(golden.write_checkpoint(tmp_path), **options)
    for prompt in golden.prompts:
        [output] = generate(llm, [prompt], GREEDY_WITH_PROMPT)
        check_answer(output, prompt)
        check_prompt_logprobs(output, prompt)
    prompts = [*golden.prompts[::-1], golden.prompts[1]]
    for cached in (True, False):
        before = llm.stats()["prompt_tokens_cached"]
        for output, prompt in zip(generate(llm, prompts), prompts, strict=True):
            check_answer(output, prompt)
        if cached:
            reused = llm.stats()["prompt_tokens_cached"] > before
            assert reused != name.startswith("paligemma")  # whose prompts see themselves whole: no part can be reused
        llm.engine.reset_caches()


@pytest.mark.once
@pytest.mark.parametrize("name", ["qwen2_windows", "llama_longrope", "gemma2"])
def test_text_models_with_two_masks_or_length_dependent_positions(tmp_path, name):
    golden = read_golden(name)
    llm = make_llm(golden.write_checkpoint(tmp_path))
    prompts = golden.prompts * 2
    for output, prompt in zip(generate(llm, prompts), prompts, strict=True):
        check_answer(output, prompt)
