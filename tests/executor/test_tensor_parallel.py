"""One model over several devices: the answers of one, and no more talk among them than the layout implies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from golden_files import read_golden
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from aphrodite_jax import LLM, ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.sharding import MODEL, check_heads, parameter_shardings
from aphrodite_jax.multimodal.context import model_class

pytestmark = pytest.mark.once

DRIVER = Path(__file__).with_name("tensor_parallel_driver.py")
CASES = ("llava_clip_llama:4", "gemma3:2")


@pytest.fixture(scope="module")
def told():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, str(DRIVER), *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_one_device(told, case):
    assert all(told[case]["right"])


@pytest.mark.parametrize("case", CASES)
def test_two_sums_a_layer_and_one_for_the_embeddings(told, case):
    """And the logits are gathered; no parameter is."""
    for program in ("forward", "decode"):
        found = told[case]["collectives"][program]
        assert found == {"all-reduce": 2 * told[case]["layers"] + 1, "all-gather": 1}


def test_each_device_has_its_share_of_the_weights(told):
    assert told["gemma3:2"]["share"] < 0.65
    assert told["llava_clip_llama:4"]["share"] < 0.5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return read_golden("llava_clip_llama").write_checkpoint(tmp_path_factory.mktemp("mesh") / "llava")


def test_where_parameters_lie(directory):
    config = ModelConfig(model=directory)
    model = abstract_model(model_class(config), config.hf_config, jnp.float32)
    for devices, of_keys in ((2, P(None, MODEL)), (4, P(None, None))):  # there are two key and value heads
        shardings = parameter_shardings(model, AbstractMesh((devices,), (MODEL,)))
        assert shardings.keys() == {path for path, _ in nnx.to_flat_state(nnx.state(model))}
        layer = ("language_model", "model", "layers", 1)
        assert shardings[*layer, "self_attn", "q_proj", "kernel"].spec == P(None, MODEL)
        assert shardings[*layer, "self_attn", "k_proj", "kernel"].spec == of_keys
        assert shardings[*layer, "self_attn", "o_proj", "kernel"].spec == P(MODEL, None)
        assert shardings[*layer, "mlp", "down_proj", "kernel"].spec == P(MODEL, None)
        assert shardings[*layer, "input_layernorm", "scale"].spec == P(None)
        assert shardings["language_model", "model", "embed_tokens", "embedding"].spec == P(MODEL, None)


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


def test_devices_that_are_not_there_are_refused(directory):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 64, but JAX finds"):
        LLM(directory, tensor_parallel_size=64, warm_up=False, show_progress=False)
