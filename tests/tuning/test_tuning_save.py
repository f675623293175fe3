"""A merged model as a checkpoint that others load."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden_files import media_of, read_golden, write_chat_model
from parity import prefill_logits
from test_tuning_lora import described, randomize_b

from aphrodite_jax import LLM, ModelConfig, SamplingParams
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.tuning import add_lora, load_model, lora_modules, merge_lora, save_merged

pytestmark = pytest.mark.once

PROMPT = read_golden("llava_clip_llama").prompts[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The config of the source, and the model with LoRA that was saved, and where."""
    source, directory = (tmp_path_factory.mktemp(name) for name in ("source", "tuned"))
    model_config = ModelConfig(model=write_chat_model(source), dtype="float32")
    model = load_model(model_config)
    add_lora(model, rank=4, targets=r"language_model\..*proj|.*\.linear_1", rngs=nnx.Rngs(0))
    randomize_b(model)
    save_merged(model, model_config, directory)
    return model_config, model, directory


def test_saving_leaves_the_model_and_brings_the_files_of_the_source(saved):
    model_config, model, directory = saved
    assert lora_modules(model)  # and their matrices are what they were: the tests below
    found = {path.name for path in directory.iterdir()}
    assert found == {
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in found - {"config.json", "model.safetensors"}:
        assert (directory / name).read_bytes() == (Path(model_config.model) / name).read_bytes()
    again = load_model(ModelConfig(model=directory, dtype="float32"))
    assert described(again) == described(load_model(model_config))
    # Without LoRA it is saved as it is, and what the source lacks does not stay.
    (directory / "added_tokens.json").write_text("{}")
    save_merged(again, model_config, directory)
    assert {path.name for path in directory.iterdir()} == found


def test_it_is_served_as_it_was_trained(saved):
    model_config, model, directory = saved
    expected = prefill_logits(model, model_config.hf_config, PROMPT)  # not merged
    assert np.abs(expected - PROMPT.logits).max() > 0.5
    llm = LLM(directory, dtype="float32", warm_up=False, show_progress=False, max_num_seqs=1, max_model_len=64)
    request = {"prompt_token_ids": PROMPT.prompt.tolist(), "multi_modal_data": media_of(PROMPT)}
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    [output] = llm.generate(request, params, use_tqdm=False, on_error="raise")
    targets = PROMPT.input_ids[1:]
    actual = [entry[int(token)].logprob for entry, token in zip(output.prompt_logprobs[1:], targets, strict=True)]
    chosen = np.asarray(jax.nn.log_softmax(expected))[np.arange(len(targets)), targets]
    np.testing.assert_allclose(actual, chosen, rtol=0, atol=2e-4)
    assert llm.render_chat([{"role": "user", "content": "w5"}])["prompt_token_ids"] == (3, 5, 4)


def test_transformers_loads_it_with_the_same_logits(saved):
    pytest.importorskip("torch", reason="the reference models of Hugging Face need torch")
    from make_goldens import all_cases, load_reference, run_reference

    model_config, model, directory = saved
    prompt = {"prompt": PROMPT.prompt, "images": PROMPT.images, "videos": ()}
    reference = run_reference(directory, all_cases()["llava_clip_llama"], prompt)
    assert load_reference(directory).config.architectures == ["LlavaForConditionalGeneration"]
    merged = nnx.clone(model)
    merge_lora(merged)
    for ours in (model, merged):
        logits = prefill_logits(ours, model_config.hf_config, PROMPT)
        np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=2e-4)


def test_the_source_is_not_written_over(saved):
    model_config, model, _ = saved
    weights = (Path(model_config.model) / "model.safetensors").read_bytes()
    for same in (model_config.model, f"{model_config.model}/../{Path(model_config.model).name}"):
        with pytest.raises(ConfigError, match="the directory that the model was loaded from: give another"):
            save_merged(model, model_config, same)
    assert (Path(model_config.model) / "model.safetensors").read_bytes() == weights
