"""Every kind of parameter through a checkpoint and back, with a module made for it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from checkpoints import uniform
from flax import nnx

from aphrodite_jax.architectures import register_model
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.layers.embedding import PatchEmbed
from aphrodite_jax.modeling.loader import WeightRule, load_model, save_pretrained
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM
from aphrodite_jax.testing.weights import random_weights

CONFIG = {"model_type": "llama", "architectures": ["EveryKindForTests"], "hidden_size": 32}


class Joined(nnx.Module):
    joined = {"qkv": ("q", "k", "v")}  # noqa: RUF012

    def __init__(self, **kw):
        self.q, self.k, self.v = (nnx.Linear(4, width, **kw) for width in (6, 2, 2))


@register_model("EveryKindForTests")
class EveryKind(nnx.Module):
    weight_rules = (
        WeightRule(r".*\.inv_freq", None),
        WeightRule(r"(?:prefix\.)?(.*)", r"\1"),
    )

    def __init__(self, config, *, dtype, rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(5, 4, **kw)
        self.layers = nnx.List([nnx.Linear(4, 6, **kw), nnx.Linear(6, 3, use_bias=False, **kw)])
        self.attention = Joined(**kw)
        self.norm = nnx.LayerNorm(4, **kw)
        self.rms = nnx.RMSNorm(4, **kw)
        self.conv = nnx.Conv(3, 7, kernel_size=(2, 5), **kw)
        self.patches = PatchEmbed(3, 2, 8, use_bias=True, dtype=dtype, rngs=rngs)
        self.table = nnx.Param(jnp.zeros((2, 3), dtype))
        self.scale = nnx.Param(jnp.zeros((), dtype))


SHAPES = {
    "embed.weight": (5, 4),
    "layers.0.weight": (6, 4),
    "layers.0.bias": (6,),
    "layers.1.weight": (3, 6),
    "attention.qkv.weight": (10, 4),
    "attention.qkv.bias": (10,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "rms.weight": (4,),
    "conv.weight": (7, 3, 2, 5),
    "conv.bias": (7,),
    "patches.weight": (8, 3, 2, 2),
    "patches.bias": (8,),
    "table": (2, 3),
    "scale": (),
}


@pytest.fixture
def tensors():
    return {name: uniform(name, shape, 1) for name, shape in SHAPES.items()}


def write(directory, tensors, config=CONFIG):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return ModelConfig(model=str(directory), dtype="float32")


def test_each_kind_has_its_axes(tmp_path, tensors):
    model = load_model(write(tmp_path, tensors))
    np.testing.assert_array_equal(model.embed.embedding[...], tensors["embed.weight"])
    np.testing.assert_array_equal(model.layers[0].kernel[...], tensors["layers.0.weight"].T)
    np.testing.assert_array_equal(model.layers[0].bias[...], tensors["layers.0.bias"])
    np.testing.assert_array_equal(model.layers[1].kernel[...], tensors["layers.1.weight"].T)
    for part, rows in (("q", slice(0, 6)), ("k", slice(6, 8)), ("v", slice(8, 10))):
        module = getattr(model.attention, part)
        np.testing.assert_array_equal(module.kernel[...], tensors["attention.qkv.weight"][rows].T)
        np.testing.assert_array_equal(module.bias[...], tensors["attention.qkv.bias"][rows])
    np.testing.assert_array_equal(model.norm.scale[...], tensors["norm.weight"])
    np.testing.assert_array_equal(model.norm.bias[...], tensors["norm.bias"])
    np.testing.assert_array_equal(model.rms.scale[...], tensors["rms.weight"])
    np.testing.assert_array_equal(model.table[...], tensors["table"])
    np.testing.assert_array_equal(model.scale[...], tensors["scale"])


def test_convolutions_compute_what_their_checkpoint_says(tmp_path, tensors):
    model = load_model(write(tmp_path, tensors))
    pixels = uniform("pixels", (2, 3, 6, 8), 2)
    expected = jax.lax.conv(pixels, tensors["patches.weight"], (2, 2), "VALID")  # [B, D, rows, columns]
    expected = expected.reshape(2, 8, -1).swapaxes(1, 2) + tensors["patches.bias"][None, None]
    np.testing.assert_allclose(model.patches(pixels), expected, atol=1e-5)
    expected = jax.lax.conv(pixels, tensors["conv.weight"], (1, 1), "SAME") + tensors["conv.bias"].reshape(1, 7, 1, 1)
    actual = model.conv(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_saving_gives_the_tensors_back(tmp_path, tensors):
    model_config = write(tmp_path / "a", tensors)
    model = load_model(model_config)
    save_pretrained(model, model_config.hf_config, tmp_path / "b")
    saved = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    assert set(saved) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)


def test_a_model_of_other_shapes_than_its_config_s_is_not_saved(tmp_path):
    """As one whose key and value heads were repeated for many devices."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = nnx.merge(*random_weights(LlamaForCausalLM, config))
    config.num_key_value_heads = 1
    with pytest.raises(CheckpointError, match=r"k_proj.weight has the shape \[8, 16\], but by the config \[4, 16\]; "):
        save_pretrained(model, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_everything_that_does_not_fit_stands_in_one_error(tmp_path, tensors):
    tensors["prefix.norm.bias"] = tensors["norm.bias"]
    tensors["rotary.inv_freq"] = tensors["norm.bias"]  # a rule drops it
    tensors["stray.weight"] = tensors["norm.bias"]
    tensors["layers.0.weight"] = tensors["layers.0.weight"].T.copy()
    tensors["attention.qkv.bias"] = tensors["attention.qkv.bias"][:6]
    tensors["table"] = tensors["table"].astype(np.int32)
    del tensors["embed.weight"], tensors["patches.bias"]
    with pytest.raises(CheckpointError) as error:
        load_model(write(tmp_path, tensors))
    assert str(error.value).splitlines()[1:-1] == [
        "  missing (2): embed.weight; patches.bias",
        "  unmatched (1): stray.weight (the model has no stray.weight)",
        "  ambiguous (1): norm.bias from norm.bias and prefix.norm.bias",
        "  misshapen (2): attention.qkv.bias is [6], expected [10]; layers.0.weight is [4, 6], expected [6, 4]",
        "  not floating point (1): table is I32",
    ]
    assert str(tmp_path) in str(error.value)


def test_names_without_a_rule_are_unmatched(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(EveryKind, "weight_rules", (WeightRule(r"(?!table)(.*)", r"\1"),))
    with pytest.raises(CheckpointError, match=r"missing \(1\): table\n  unmatched \(1\): table \(no rule\)"):
        load_model(write(tmp_path, tensors))


def test_long_lists_are_cut(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing \(15\): .*, and 7 more"):
        load_model(write(tmp_path, {"rotary.inv_freq": np.zeros(2, np.float32)}))


def test_state_that_no_checkpoint_has_is_refused(tmp_path, tensors, monkeypatch):
    build = EveryKind.__init__

    def with_cache(self, config, *, dtype, rngs):
        build(self, config, dtype=dtype, rngs=rngs)
        self.cache = nnx.Variable(jnp.zeros(3))

    monkeypatch.setattr(EveryKind, "__init__", with_cache)
    with pytest.raises(CheckpointError, match=r"cache \(Variable\).*nnx.Param"):
        load_model(write(tmp_path, tensors))
