"""Our models against stored answers of Hugging Face's: logits, greedy tokens, layouts and forms of files."""

import functools
import itertools
import re
import tempfile
from pathlib import Path

import checkpoints
import chex
import jax
import numpy as np
import pytest
from flax import nnx
from golden_files import golden_names, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import COMPILE_FAST, greedy_logits, load, logits_of, metadata, prefill_logits
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TOLERANCE = 2e-4
"""Largest absolute difference of float32 logits; every greedy choice of the reference is clear by 0.01."""


def check_prefill(model, config, prompt):
    np.testing.assert_allclose(prefill_logits(model, config, prompt), prompt.logits, rtol=0, atol=TOLERANCE)


def check_greedy(model, config, prompt):
    actual, length = greedy_logits(model, config, prompt), len(prompt.input_ids)
    np.testing.assert_allclose(actual[:length], prompt.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(actual[length - 1 :].argmax(-1), prompt.tokens)
    assert len(prompt.tokens) == 32


NEWEST_TOO = re.compile("llama|qwen2_windows|gemma3|paligemma2|llava_clip_mistral|qwen3_vl")
"""Goldens that are compared under every version of jax."""


GOLDEN_NAMES = [
    name if NEWEST_TOO.fullmatch(name) else pytest.param(name, marks=pytest.mark.once) for name in golden_names()
]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_and_greedy_tokens_are_the_reference_s(tmp_path, name):
    golden = read_golden(name)
    model, config = load(golden.write_checkpoint(tmp_path))
    for prompt in golden.prompts:
        check_greedy(model, config, prompt)


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_every_layout_gives_the_reference_s_answers(tmp_path, layout):
    golden = read_golden("llava_clip_mistral")
    old = checkpoints.old_form(golden.config)
    model, config = load(golden.write_checkpoint(tmp_path, config=old, layout=layout))
    check_greedy(model, config, golden.prompts[1])


@pytest.mark.parametrize(
    "name",
    ["llava_siglip_qwen2", "llava_clip_qwen2_tied", "llava_clip_llama_tied_above", "llava_clip_layers"],
)
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_every_layout_and_form_fills_the_same_parameters(tmp_path, name, layout):
    golden = read_golden(name)
    hub, _ = load(golden.write_checkpoint(tmp_path / "hub"))
    old = checkpoints.old_form(golden.config)
    other, _ = load(golden.write_checkpoint(tmp_path / "other", config=old, layout=layout, shards=3))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(hub)))


FAMILIES = [name for name in golden_names() if read_golden(name).described["hub_names"]]


@pytest.mark.once
@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_the_hub_fill_the_same_parameters(tmp_path, name):
    golden = read_golden(name)
    memory, _ = load(golden.write_checkpoint(tmp_path / "memory", layout="memory"))
    old = checkpoints.old_form(golden.config)
    hub, _ = load(golden.write_checkpoint(tmp_path / "hub", config=old, layout="hub"))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(hub)), nnx.to_pure_dict(nnx.state(memory)))


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in golden_names() if name.startswith("llama_")])
def test_old_configs_mean_the_same_rope_scalings_and_biases(tmp_path, name):
    golden = read_golden(name)
    model, config = load(golden.write_checkpoint(tmp_path, config=checkpoints.old_form(golden.config)))
    check_prefill(model, config, golden.prompts[-1])


def test_the_goldens_cover_what_is_promised():
    goldens = {name: read_golden(name) for name in golden_names()}
    texts = [golden.config for golden in goldens.values() if "vision_config" not in golden.config]
    kinds = {config["rope_parameters"]["rope_type"] for config in texts if config["model_type"] != "gemma3_text"}
    assert kinds == {"default", *ROPE_INIT_FUNCTIONS}
    for tower, text in itertools.product(("clip", "siglip"), ("llama", "mistral", "qwen2")):
        golden = goldens[f"llava_{tower}_{text}"]
        assert golden.config["vision_config"]["model_type"] == f"{tower}_vision_model"
        assert golden.config["text_config"]["model_type"] == text
        assert [len(prompt.images) for prompt in golden.prompts] == [0, 1, 3]
        window = golden.config["text_config"].get("sliding_window")
        assert (window is not None) == (text == "mistral")
        assert window is None or window < min(len(prompt.input_ids) for prompt in golden.prompts)


@functools.cache
def multimodal_programs():
    """``(input_ids of a prompt with one image, single, batched, encode)`` over one model."""
    golden = read_golden("llava_clip_mistral")
    with tempfile.TemporaryDirectory() as directory:
        model, config = load(golden.write_checkpoint(Path(directory)))
    graphdef, params = nnx.split(model)
    ids = golden.prompts[1].input_ids
    attn_metadata = metadata(model, config, len(ids))

    def single(params, ids, pixel_values):
        arrays = {"pixel_values": pixel_values}
        return logits_of(nnx.merge(graphdef, params), ids, np.arange(len(ids)), attn_metadata, arrays)

    def encode(params, pixel_values):
        return nnx.merge(graphdef, params).embed_multimodal(pixel_values)["image"]

    batched = jax.vmap(single, (None, 0, 0))
    return ids, *(
        functools.partial(jax.jit(fn, compiler_options=COMPILE_FAST), params) for fn in (single, batched, encode)
    )


@settings(max_examples=10, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=3, max_size=3))
def test_batched_is_single(seeds):
    """Prompts with an image each as a mapped batch and one by one; their images in one call of the tower."""
    template, single, batched, encode = multimodal_programs()
    ids = np.stack([_other_text(template, seed) for seed in seeds])
    pixel_values = np.stack([checkpoints.pixel_values(checkpoints.images(1, seed)) for seed in seeds])
    together = np.asarray(batched(ids, pixel_values))
    apart = np.stack([single(*one) for one in zip(ids, pixel_values, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=0, atol=TOLERANCE)
    images = np.asarray(encode(pixel_values[:, 0]))
    one_by_one = np.concatenate([encode(one) for one in pixel_values])
    np.testing.assert_allclose(images, one_by_one, rtol=0, atol=TOLERANCE)


def _other_text(template, seed):
    noise = checkpoints.uniform("other text", template.shape, seed)
    text = 3 + ((noise + 1) / 2 * (checkpoints.IMAGE_TOKEN - 3)).astype(np.int32)
    return np.where(template == checkpoints.IMAGE_TOKEN, template, text)
