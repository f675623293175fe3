"""Where parameters lie on a mesh: every one is named, and heads, feed-forwards and the vocabulary are divided."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from golden_files import read_golden
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM
from aphrodite_jax.modeling.sharding import (
    MESH_AXES,
    MODEL,
    axes_of_parameters,
    check_heads,
    place_parameters,
)
from aphrodite_jax.multimodal.context import class_of_config, model_class
from aphrodite_jax.testing import tiny_models

pytestmark = pytest.mark.once

LAYER = ("language_model", "model", "layers", 1)
TOWER_LAYER = ("vision_tower", "vision_model", "encoder", "layers", 1)


def read_config(name):
    config = transformers.AutoConfig.for_model(**read_golden(name).config)
    return class_of_config(config), config


def shapes_of(model):
    return {path: variable.get_value().shape for path, variable in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("name", tiny_models())
def test_every_parameter_of_every_family_is_named(name):
    tiny = tiny_models()[name]
    model = abstract_model(tiny.model_cls, tiny.config, jnp.float32)
    shapes, axes = shapes_of(model), axes_of_parameters(model)
    assert axes.keys() == shapes.keys()
    for path, shape in shapes.items():
        assert len(axes[path]) == len(shape)
        if len(shape) == 2 and {"layers", "layer", "blocks"} & set(path):  # a matrix of a layer, of decoder and tower
            assert [MESH_AXES[name] for name in axes[path]].count(MODEL) == 1, path


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    directory = read_golden("llava_clip_llama").write_checkpoint(tmp_path_factory.mktemp("mesh") / "llava")
    config = ModelConfig(model=directory)
    return abstract_model(model_class(config), config.hf_config, jnp.float32)


def specs_of(model, *of_mesh):
    return {path: place.sharding.spec for path, place in place_parameters(model, *of_mesh).items()}


@pytest.mark.parametrize("devices", [2, 4])
def test_where_parameters_lie(llava, devices):
    specs = specs_of(llava, AbstractMesh((devices,), (MODEL,)))
    assert specs.keys() == shapes_of(llava).keys()
    assert specs[*LAYER, "self_attn", "q_proj", "kernel"] == P(None, MODEL)
    assert specs[*LAYER, "self_attn", "k_proj", "kernel"] == P(None, MODEL)
    assert specs[*LAYER, "self_attn", "o_proj", "kernel"] == P(MODEL, None)
    assert specs[*LAYER, "mlp", "down_proj", "kernel"] == P(MODEL, None)
    assert specs[*LAYER, "input_layernorm", "scale"] == P(None)
    assert specs["language_model", "model", "embed_tokens", "embedding"] == P(MODEL, None)


@pytest.mark.parametrize(("devices", "of_devices"), [(2, [0, 1]), (4, [0, 0, 1, 1])])
def test_each_device_has_the_key_head_that_its_query_heads_read(llava, devices, of_devices):
    """There are four query heads, and two of keys and values."""
    path = (*LAYER, "self_attn", "k_proj", "kernel")
    place = place_parameters(llava, AbstractMesh((devices,), (MODEL,)))[path]
    width, columns = shapes_of(llava)[path]
    kernel = np.arange(width * columns).reshape(width, columns)
    placed = place.values(kernel)
    assert place.sharding.spec == P(None, MODEL)
    assert placed.shape == place.shape(kernel.shape)
    heads = np.split(kernel, 2, axis=1)
    for found, head in zip(np.split(placed, devices, axis=1), of_devices, strict=True):
        np.testing.assert_array_equal(found, heads[head])
        assert found.shape == place.shard_shape(kernel.shape)


def test_key_heads_of_a_tower_are_not_repeated(llava):
    """Nor are its query heads divided: four devices do not divide its two heads."""
    specs = specs_of(llava, AbstractMesh((4,), (MODEL,)), "weights")
    assert {specs[*TOWER_LAYER, "self_attn", f"{name}_proj", "kernel"] for name in "qkv"} == {P(None, None)}


def test_what_encodes_media_lies_whole_or_is_divided(llava):
    mesh = AbstractMesh((2,), (MODEL,))
    matrices = {
        (*TOWER_LAYER, "self_attn", "v_proj", "kernel"): P(None, MODEL),
        (*TOWER_LAYER, "mlp", "fc2", "kernel"): P(MODEL, None),
        ("multi_modal_projector", "linear_1", "kernel"): P(None, MODEL),
        ("multi_modal_projector", "linear_1", "bias"): P(MODEL),
        ("multi_modal_projector", "linear_2", "kernel"): P(MODEL, None),
    }
    by_items, by_weights = (specs_of(llava, mesh, how) for how in ("items", "weights"))
    assert {path: by_weights[path] for path in matrices} == matrices
    assert {path for path in by_items if by_items[path] != by_weights[path]} >= matrices.keys()
    assert all(by_items[path] == by_weights[path] for path in by_items if path[0] == "language_model")
    assert all(set(by_items[path]) == {None} for path in by_items if path[0] != "language_model")
    with pytest.raises(ConfigError, match="encoder_parallel is one of items, weights, got 'both'"):
        place_parameters(llava, mesh, "both")


@pytest.mark.parametrize("name", ["phi3", "qwen3"])
def test_each_of_two_devices_has_half_of_a_text_model(name):
    """But for norms, even where a checkpoint joins projections."""
    model = abstract_model(*read_config(name), jnp.float32)
    places = place_parameters(model, AbstractMesh((2,), (MODEL,)))
    shapes = shapes_of(model)
    of_one = sum(math.prod(places[path].shard_shape(shape)) for path, shape in shapes.items())
    norms = sum(math.prod(shape) for path, shape in shapes.items() if path[-1] == "scale")
    assert 2 * (of_one - norms) == sum(map(math.prod, shapes.values())) - norms


class Own(LlamaForCausalLM):
    """With parameters of its own."""

    def __init__(self, config, *, dtype, rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.adapters = nnx.List([nnx.Linear(8, 16, param_dtype=dtype, rngs=rngs) for _ in range(2)])


class Named(Own):
    logical_axes = ((r"adapters\.\d+\.kernel", ("width", "inner")), (r"adapters\.\d+\.bias", ("inner",)))


def test_what_no_pattern_names_is_refused_in_one_error():
    model = abstract_model(Own, read_config("llama")[1], jnp.float32)
    with pytest.raises(
        ConfigError, match=r"of Own must have names .*: adapters.\*.bias \[16\] has no names; adapt"
    ) as e:
        place_parameters(model, AbstractMesh((2,), (MODEL,)))
    assert "Give the class logical_axes" in str(e.value)


def test_a_class_may_name_its_own():
    model = abstract_model(Named, read_config("llama")[1], jnp.float32)
    specs = specs_of(model, AbstractMesh((2,), (MODEL,)))
    assert specs["adapters", 1, "kernel"] == P(None, MODEL)
    assert specs["model", "layers", 0, "mlp", "up_proj", "kernel"] == P(None, MODEL)


@pytest.mark.parametrize("axes", [("width",), ("width", "breadth")])
def test_names_must_fit_the_axes(monkeypatch, axes):
    monkeypatch.setattr(Named, "logical_axes", ((r"adapters\.\d+\.kernel", axes), *Named.logical_axes))
    model = abstract_model(Named, read_config("llama")[1], jnp.float32)
    with pytest.raises(ConfigError, match=rf"adapters.\*.kernel \[8, 16\] is named {', '.join(axes)}\."):
        axes_of_parameters(model)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "message"),
    [
        (6, 2, 4, r"does not divide the model's 6 attention heads; it may be 1, 2, 3, 6"),
        (12, 3, 2, "neither divides the model's 3 key and value heads nor is a multiple"),
    ],
)
def test_heads_that_can_t_be_divided_are_refused(heads, kv_heads, devices, message):
    with pytest.raises(ConfigError, match=message):
        check_heads(heads, kv_heads, devices)
