"""Every family over several devices: the answers of one, and no more talk among them than the layout implies.

All sizes of all families, about ten minutes: EVERY_MESH=1 python -m pytest tests/executor/test_tensor_parallel.py
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from golden_files import read_golden
from jax.sharding import AbstractMesh

from aphrodite_jax import LLM
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.layers.attention import attend_batch
from aphrodite_jax.modeling.sharding import MODEL
from aphrodite_jax.testing import tiny_models

pytestmark = pytest.mark.once

DRIVER = Path(__file__).with_name("tensor_parallel_driver.py")
PROCESSES = 2
MULTIMODAL = tuple(tiny_models())
ALONE = ("phi3", "qwen2", "qwen3", "llama_biases_mha")
"""Text models that no multimodal one has for its language model, or not with these traits."""
TEXT = (*ALONE, "llama", "mistral", "gemma", "gemma2", "gemma3_text")
OWN_TOWER = tuple(name for name in MULTIMODAL if name not in ("llava_next", "paligemma2", "smolvlm", "llava_onevision"))
"""Multimodal models whose tower and projector are not those of another one."""
TOWERS = {  # layers that run, and projectors of two matrices
    "llava": (1, 1),
    "llava_next": (1, 1),
    "llava_onevision": (2, 1),
    "paligemma": (2, 0),
    "paligemma2": (2, 0),
    "gemma3": (2, 0),
    "idefics3": (2, 0),
    "smolvlm": (2, 0),
    "internvl": (2, 1),
    "pixtral": (2, 1),
    "mistral3": (2, 1),
    "qwen2_vl": (2, 1),
    "qwen2_5_vl": (2, 1),
    "qwen3_vl": (2, 2),
}
if os.environ.get("EVERY_MESH"):
    ways = [(name, how) for name in MULTIMODAL for how in ("items", "weights")] + [(name, "items") for name in TEXT]
    CASES = [f"{name}:{devices}:{how}" for name, how in ways for devices in (2, 4, 8, "2x4")]
else:
    CASES = [f"{name}:8:items" for name in MULTIMODAL] + [f"{name}:2:weights" for name in OWN_TOWER]
    CASES += [f"{name}:{devices}:items" for name in ALONE for devices in (2, 8)]
    CASES += ["llava:4:items", "gemma3:2x4:weights"]
WITH_MEDIA = [case for case in CASES if case.split(":")[0] in MULTIMODAL]


def run(cases):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, str(DRIVER), *cases], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told(computed_once):
    def compute():
        names = list(dict.fromkeys(case.split(":")[0] for case in CASES))
        shares = [[case for case in CASES if case.split(":")[0] in names[i::PROCESSES]] for i in range(PROCESSES)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return {case: found for part in pool.map(run, shares) for case, found in part.items()}

    return computed_once("tensor_parallel", compute)


def programs(told, case, *names):
    found = [program for program in told[case]["programs"] if program["name"] in names]
    assert found
    return found


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_one_device(told, case):
    assert told[case]["found"] == told[case]["expected"]
    assert len(set(told[case]["expected"])) > 1


@pytest.mark.parametrize("case", CASES)
def test_two_sums_a_layer_and_one_for_the_embeddings(told, case):
    """And the logits of the one request are gathered, and before that what a step reads of the encoder cache.

    So no parameter is, and not the cache, which has more rows than a step.
    """
    for program in programs(told, case, "forward", "decode"):
        found, gathered = program["collectives"], [[1, told[case]["vocab_size"]]]
        if program["name"] == "forward" and case in WITH_MEDIA:
            decode_rows, prompt_rows, _ = program["key"]
            gathered.insert(0, [decode_rows + prompt_rows, told[case]["width"]])
        assert found.keys() == {"all-reduce", "all-gather"}
        assert len(found["all-reduce"]) == 2 * told[case]["layers"] + 1
        assert found["all-gather"] == gathered


@pytest.mark.parametrize("case", WITH_MEDIA)
def test_encoding_exchanges_rows_of_items_once_or_sums_in_each_layer(told, case):
    name, devices, encoder_parallel = case.split(":")
    devices = int(devices.rpartition("x")[2])
    for program in programs(told, case, "encode"):
        found = program["collectives"]
        if encoder_parallel == "items":
            assert found.keys() == {"all-to-all"}  # each device keeps its columns of all items' rows
            of_each, width = max(2, devices) // devices, told[case]["width"]  # two images, or a video, filled up
            parts = [(shape[0], shape[-1]) for shape in found["all-to-all"]]
            assert parts == [(of_each, width // devices)] * devices  # one exchange, with a part from each
        else:
            layers, projectors = TOWERS[name]
            of_layer = 2 if devices == 2 else 1  # towers have two heads: with more devices attention is whole
            assert found.keys() == {"all-reduce"}
            assert len(found["all-reduce"]) == layers * of_layer + projectors


def test_each_device_has_its_share_of_the_weights(told):
    """A half or an eighth, but for norms, key and value heads that are repeated, and encoders that may lie whole."""
    assert told["phi3:2:items"]["share"] < 0.51
    assert told["phi3:8:items"]["share"] < 0.15
    assert told["qwen2_5_vl:2:weights"]["share"] < 0.56


@pytest.mark.parametrize("devices", [4, 8])
def test_layers_that_are_looked_into_compute_the_same(told, devices):
    assert told[f"llava:{devices}:items"]["apart"] < 1e-5


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "of_each"),
    [
        (8, 8, 4, (2, 2)),
        (8, 2, 4, (2, 1)),
        (8, 2, 8, (1, 1)),
        (8, 4, 2, (4, 2)),
        (2, 2, 8, (2, 2)),
        (25, 25, 8, (25, 25)),
    ],
)
def test_attention_is_always_called_by_device(heads, kv_heads, devices, of_each):
    """Where devices don't divide the heads, each computes all: a kernel's call is never left to XLA to divide."""
    q, kv = (jax.ShapeDtypeStruct((1, 16, n, 8), jnp.float32) for n in (heads, kv_heads))
    with jax.sharding.use_abstract_mesh(AbstractMesh((devices,), (MODEL,))):
        jaxpr = jax.make_jaxpr(attend_batch)(q, kv, kv)
    [call] = [equation for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    shapes = [x.aval.shape for x in call.params["jaxpr"].invars]
    assert [shape[2] for shape in shapes[:3]] == [of_each[0], of_each[1], of_each[1]]
    others = {equation.primitive.name for equation in jaxpr.eqns} - {"shard_map"}
    assert not others & {"dot_general", "exp", "pallas_call", "pjit", "custom_vjp_call"}


def test_devices_that_are_not_there_are_refused(tmp_path):
    directory = read_golden("llava_clip_llama").write_checkpoint(tmp_path / "llava")
    with pytest.raises(ConfigError, match="tensor_parallel_size is 64, but JAX finds"):
        LLM(directory, tensor_parallel_size=64, warm_up=False, show_progress=False)


def test_an_unknown_way_to_encode_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="encoder_parallel must be 'items' or 'weights', got 'both'"):
        LLM(tmp_path, encoder_parallel="both")
