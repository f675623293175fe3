"""Low-rank updates: where they are put, that fresh ones change nothing, and that merging leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from golden_files import read_golden
from tuning_cases import logits_of, open_case, shared_case

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.multimodal.context import class_of_config
from aphrodite_jax.tuning import BatchSizes, LoRALinear, add_lora, load_model, lora_modules, merge_lora, pack

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def text_batch(case):
    return pack([case.prepared[0]], BatchSizes.of([[case.prepared[0]]], case.prepared[0].num_rows))


def described(model):
    """Path to type, shape and dtype of each parameter, and to the type of each module."""
    parameters = {path: (type(v), v.shape, v.dtype) for path, v in nnx.to_flat_state(nnx.state(model))}
    return parameters, {path: type(module) for path, module in nnx.iter_modules(model)}


def randomize_b(model):
    for index, module in enumerate(lora_modules(model).values()):
        noise = jax.random.normal(jax.random.key(index), module.lora_b.shape)
        module.lora_b.set_value(0.1 * noise)


@pytest.mark.parametrize(("name", "dtype"), [("llava_clip_llama", "float32"), ("gemma", "bfloat16")])
def test_a_fresh_update_changes_nothing_and_a_merged_one_leaves_no_trace(name, dtype):
    case = shared_case(name)
    model = load_model(ModelConfig(model=case.directory, dtype=dtype))
    batch, tree = text_batch(case), described(model)
    before = logits_of(model, batch)
    paths = add_lora(model, rank=4, alpha=8, rngs=nnx.Rngs(0))
    assert {path.rpartition(".")[2] for path in paths} == PROJECTIONS
    assert len(paths) == len(PROJECTIONS) * 2  # layers
    assert set(lora_modules(model)) == set(paths)
    added = nnx.state(model, nnx.LoRAParam)
    assert len(jax.tree.leaves(added)) == 2 * len(paths)
    assert {x.dtype for x in jax.tree.leaves(added)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(logits_of(model, batch), before)

    randomize_b(model)
    unmerged = logits_of(model, batch)
    assert np.abs(unmerged - before).max() > 0.5
    assert merge_lora(model) == paths
    assert described(model) == tree
    tolerance = 1e-4 if dtype == "float32" else 0.1 * np.abs(unmerged - before).max()  # matrices are rounded
    np.testing.assert_allclose(logits_of(model, batch), unmerged, rtol=0, atol=tolerance)


def test_an_update_is_alpha_over_rank_times_the_product():
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    module = LoRALinear(linear, 2, 1.5, rngs=nnx.Rngs(1))
    module.lora_b.set_value(jnp.ones((2, 4)))
    x = jax.random.normal(jax.random.key(2), (3, 6))
    expected = linear(x) + 1.5 * (x @ module.lora_a[...] @ module.lora_b[...])
    np.testing.assert_allclose(module(x), expected, rtol=1e-5)
    model = nnx.List([linear])
    add_lora(model, rank=2, alpha=3, targets="0", rngs=nnx.Rngs(1))
    assert lora_modules(model)["0"].scale == 1.5


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "per_layer"),
    [("llava_clip_llama", 7), ("idefics3", 7), ("pixtral", 7), ("qwen2_5_vl", 7), ("gemma3", 7), ("phi3", 7)],
)
def test_default_targets_are_the_language_model_s_projections(name, per_layer):
    config = transformers.AutoConfig.for_model(**read_golden(name).config)
    model = abstract_model(class_of_config(config), config, jnp.float32)
    paths = add_lora(model, rngs=nnx.Rngs(0))
    text = config.get_text_config()
    assert len(paths) == per_layer * text.num_hidden_layers
    assert all(path.removeprefix("language_model.").startswith("model.layers.") for path in paths)


def test_targets_may_be_any_linear_of_the_tree():
    model = load_model(shared_case("qwen2_vl").model_config)
    paths = add_lora(model, targets=r"visual\..*(q_proj|mlp\.\d+)", rank=2, rngs=nnx.Rngs(0))
    assert [path for path in paths if "merger" in path] == ["visual.merger.mlp.0", "visual.merger.mlp.2"]
    assert [path for path in paths if "q_proj" in path] == [f"visual.blocks.{i}.attn.q_proj" for i in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": "nothing"},
            r"no Linear of Llava.*there are language_model.lm_head, .*layers.\*",
        ),
        ({"targets": "("}, "no regular expression"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 2.0}, "at least 1, got 2.0"),
        ({"rank": 33}, r"rank 33 is above the smaller side of language_model.model.layers.\*.self_attn.k_proj.*32"),
        ({"alpha": 0}, "alpha is a number above 0"),
    ],
)
def test_a_wrong_option_says_what_there_is_and_changes_nothing(options, message):
    model = shared_case("llava_clip_llama").model
    before = described(model)
    with pytest.raises(ConfigError, match=message):
        add_lora(model, rngs=nnx.Rngs(0), **options)
    assert described(model) == before


def test_lora_is_added_once_and_merged_where_it_is(tmp_path):
    model = open_case("llama", tmp_path).model
    with pytest.raises(ConfigError, match="no LoRA to merge"):
        merge_lora(model)
    add_lora(model, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"LoRA already, on model.layers.\*.mlp.down_proj"):
        add_lora(model, rngs=nnx.Rngs(0))
