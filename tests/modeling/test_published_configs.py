"""Models at their largest published sizes, by shapes alone: no machine here could hold them."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.loader.matching import match
from aphrodite_jax.modeling.loader.parameters import wanted_tensors
from aphrodite_jax.modeling.loader.safetensors_file import StoredTensor
from aphrodite_jax.modeling.models.interfaces import position_axes
from aphrodite_jax.modeling.sharding import axes_of_parameters
from aphrodite_jax.multimodal.context import class_of_config
from kernels_pallas.intervals import causal

pytestmark = pytest.mark.once

PUBLISHED = sorted((Path(__file__).parents[1] / "published").glob("*.json"))
ROWS = 32
FEW_LAYERS = 6


def name_of(path):
    return path.stem


def config_of(path):
    return transformers.AutoConfig.for_model(**json.loads(path.read_text()))


@functools.cache
def published_model(path):
    """The model without its weights."""
    config = config_of(path)
    return abstract_model(class_of_config(config), config, jnp.bfloat16)


def with_few_layers(config):
    """Enough for every kind there is."""
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, FEW_LAYERS)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:FEW_LAYERS]
        assert set(text.layer_types) == set(kinds)
    return config


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_a_forward_pass_has_the_right_shapes(path):
    config = with_few_layers(config_of(path))
    text, model_cls = config.get_text_config(), class_of_config(config)
    model = abstract_model(model_cls, config, jnp.bfloat16)
    graphdef, state = nnx.split(model)
    axes = position_axes(model_cls)
    positions = np.zeros((ROWS,) if axes == 1 else (axes, ROWS), np.int32)
    masks = model_cls.mask_specs(config)
    metadata = AttentionMetadata(intervals={kind: causal(ROWS, window=spec.window) for kind, spec in masks.items()})

    def forward(state, ids, positions):
        model = nnx.merge(graphdef, state)
        embeds = model.embed_input_ids(ids)
        hidden, _ = model(ids, positions, None, metadata, inputs_embeds=embeds)
        return embeds, hidden, model.compute_logits(hidden)

    with jax.numpy_dtype_promotion("standard"):  # flax's own norms add bfloat16 to float32
        embeds, hidden, logits = jax.eval_shape(forward, state, np.zeros(ROWS, np.int32), positions)
    assert embeds.shape[0] == ROWS
    assert embeds.shape[1] % text.hidden_size == 0
    assert (hidden.shape, hidden.dtype) == ((ROWS, text.hidden_size), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((ROWS, text.vocab_size), jnp.float32)
    assert len(model_cls.kv_cache_shapes(config_of(path))) == config_of(path).get_text_config().num_hidden_layers


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_every_parameter_is_named_for_several_devices(path):
    model = published_model(path)
    assert len(axes_of_parameters(model)) == len(nnx.to_flat_state(nnx.state(model)))


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_every_tensor_of_hugging_face_s_model_has_its_place(path):
    """Names and shapes that the reference holds in memory fill our parameters, and none is left."""
    pytest.importorskip("torch", reason="the reference models of Hugging Face need torch")
    from make_goldens import reference_shapes

    model = published_model(path)
    shapes = reference_shapes(json.loads(path.read_text()))
    stored = {
        name: StoredTensor(file=path, dtype="BF16", shape=tuple(shape), offset=0, num_bytes=0)
        for name, shape in shapes.items()
    }
    wanted = wanted_tensors(model)
    chosen, _ = match(type(model).weight_rules, stored, wanted, source=path.stem)
    assert set(chosen) == set(wanted)
