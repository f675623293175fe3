"""Our models against stored answers of Hugging Face's: logits, greedy tokens, layouts and forms of files."""

import functools
import itertools
import tempfile
from pathlib import Path

import checkpoints
import chex
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import golden_names, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import map_media, prompt_intervals, prompt_positions
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from kernels_pallas.intervals import RowIntervals, causal

TOLERANCE = 2e-4
"""Largest absolute difference of float32 logits; every greedy choice of the reference is clear by 0.01."""
COMPILE_FAST = {"xla_backend_optimization_level": 0}
"""Compiling takes nearly all of the time of these tests; engine tests compile as users do."""


def load(directory):
    model_config = ModelConfig(model=directory, dtype="float32")
    return load_model(model_config), model_config.hf_config


def metadata(model, config, length, *, placeholders=None, prompt_length=None):
    """All rows of one prompt and its answer; a row of the answer knows the tokens up to its own alone."""
    specs = type(model).mask_specs(config)
    answer = length - (prompt_length or length)
    lengths = None if prompt_length is None else jnp.maximum(jnp.arange(length) + 1, prompt_length)
    prompt = prompt_intervals(specs, length - answer, placeholders or {})
    behind = {kind: causal(answer, offset=length - answer, window=spec.window) for kind, spec in specs.items()}
    return AttentionMetadata(
        intervals={
            kind: RowIntervals(*map(np.concatenate, zip(prompt[kind], behind[kind], strict=True))) for kind in specs
        },
        lengths=lengths,
    )


def logits(model, input_ids, positions, attn_metadata, arrays):
    hidden, _ = model(jnp.asarray(input_ids), jnp.asarray(positions), None, attn_metadata, **arrays)
    return model.compute_logits(hidden)


def inputs_of(config, prompt):
    """The golden prompt through the registries: the mappers' arrays, places of the items, positions of the prompt."""
    media = golden_files.media_of(prompt)
    limits = {modality: len(items) for modality, items in media.items()}
    model_config = ModelConfig(model=config.name_or_path, limit_mm_per_prompt=limits)
    inputs = LLMInputs(prompt_token_ids=prompt.prompt.tolist(), multi_modal_data=media)
    inputs = INPUT_REGISTRY.process_input(model_config, inputs)
    np.testing.assert_array_equal(inputs.prompt_token_ids, prompt.input_ids)
    arrays = dict(MULTIMODAL_REGISTRY.map_input(model_config, media))
    if config.model_type == "llava":  # where mapping is scaling alone, that, for a test of the model alone
        arrays = {"pixel_values": checkpoints.pixel_values(prompt.images)} if prompt.images else {}
    positions = prompt_positions(model_config, prompt.input_ids, map_media(model_config, inputs))
    return arrays, inputs.placeholders, positions


def positions_of(prompt_positions, length):
    """Of all rows, those of the answer behind those of the prompt."""
    if prompt_positions is None:
        return np.arange(length)
    axes, known = prompt_positions.shape
    behind = prompt_positions.max() + 1 + np.arange(length - known)
    return np.concatenate([prompt_positions, np.broadcast_to(behind, (axes, length - known))], axis=1)


def run(model, *args):
    graphdef, params = nnx.split(model)

    def call(params, *args):
        return logits(nnx.merge(graphdef, params), *args)

    return np.asarray(jax.jit(call, compiler_options=COMPILE_FAST)(params, *args))


def check_prefill(model, config, prompt):
    """The prompt alone, as a caller without an engine has it."""
    arrays, placeholders, positions = inputs_of(config, prompt)
    ids = prompt.input_ids
    attn_metadata = metadata(model, config, len(ids), placeholders=placeholders)
    actual = run(model, ids, positions_of(positions, len(ids)), attn_metadata, arrays)
    np.testing.assert_allclose(actual, prompt.logits, rtol=0, atol=TOLERANCE)


def check_greedy(model, config, prompt):
    """Every step of greedy decoding in one call.

    Row by row: while the tokens so far are the reference's, greedy decoding would see this very row.
    """
    arrays, placeholders, positions = inputs_of(config, prompt)
    ids, length = prompt.continued, len(prompt.input_ids)
    attn_metadata = metadata(model, config, len(ids), placeholders=placeholders, prompt_length=length)
    actual = run(model, ids, positions_of(positions, len(ids)), attn_metadata, arrays)
    np.testing.assert_allclose(actual[:length], prompt.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(actual[length - 1 :].argmax(-1), prompt.tokens)
    assert len(prompt.tokens) == 32


@pytest.mark.parametrize("name", golden_names())
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


@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_the_hub_fill_the_same_parameters(tmp_path, name):
    golden = read_golden(name)
    memory, _ = load(golden.write_checkpoint(tmp_path / "memory", layout="memory"))
    old = checkpoints.old_form(golden.config)
    hub, _ = load(golden.write_checkpoint(tmp_path / "hub", config=old, layout="hub"))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(hub)), nnx.to_pure_dict(nnx.state(memory)))


@pytest.mark.parametrize("name", [name for name in golden_names() if name.startswith("llama_")])
def test_old_configs_mean_the_same_rope_scalings_and_biases(tmp_path, name):
    golden = read_golden(name)
    model, config = load(golden.write_checkpoint(tmp_path, config=checkpoints.old_form(golden.config)))
    check_prefill(model, config, golden.prompts[-1])


def test_the_goldens_cover_what_is_promised():
    goldens = {name: read_golden(name) for name in golden_names()}
    texts = [golden.config for golden in goldens.values() if "vision_config" not in golden.config]
    kinds = {config["rope_parameters"]["rope_type"] for config in texts}
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
        return logits(nnx.merge(graphdef, params), ids, np.arange(len(ids)), attn_metadata, arrays)

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
