"""Option values: what they refuse, what they read, and the names that the package shows."""

import dataclasses
import json
import subprocess
import sys

import llava_files
import numpy as np
import pytest
import transformers

import aphrodite_jax
from aphrodite_jax.config import EngineConfig, ModelConfig, shipped_model_path
from aphrodite_jax.errors import AphroditeError, ConfigError
from aphrodite_jax.sampling_params import SamplingParams


@pytest.fixture
def llava(tmp_path):
    return llava_files.write_llava(tmp_path / "llava")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of auto, float32, bfloat16, float16, got 'float64'"),
        ({"dtype": None}, "dtype must be one of"),
        ({"limit_mm_per_prompt": {"image": 0}}, r"limit_mm_per_prompt\['image'\] must be at least 1, got 0"),
        ({"limit_mm_per_prompt": {"image": -3}}, "at least 1, got -3"),
        ({"limit_mm_per_prompt": {"image": 1.5}}, "at least 1, got 1.5"),
        ({"limit_mm_per_prompt": {"image": True}}, "at least 1, got True"),
        ({"limit_mm_per_prompt": "image=2"}, "limit_mm_per_prompt is a mapping, got str"),
        ({"mm_processor_kwargs": [1]}, "mm_processor_kwargs is a mapping, got list"),
        ({"hf_overrides": None}, "hf_overrides is a mapping, got NoneType"),
        ({"max_model_len": 0}, "max_model_len must be a whole number of at least 1, got 0"),
        ({"max_model_len": 12.0}, "max_model_len must be a whole number"),
        ({"max_model_len": True}, "max_model_len must be a whole number"),
        ({"max_image_pixels": 0}, "max_image_pixels must be a whole number of at least 1, got 0"),
        ({"max_image_pixels": None}, "max_image_pixels must be a whole number of at least 1, got None"),
        ({"seed": -1}, "seed must be a whole number in"),
        ({"seed": 2**32}, "seed must be a whole number in"),
        ({"seed": 0.5}, "seed must be a whole number in"),
        ({"seed": True}, "seed must be a whole number in"),
        ({"revision": "main"}, "revision 'main' has no meaning for the directory"),
        ({"media_roots": "/pictures"}, "media_roots is a list of directories, got '/pictures'"),
        ({"media_roots": 3}, "media_roots is a list of directories, got 3"),
    ],
)
def test_model_config_refuses(llava, options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(model=llava, **options)


@pytest.mark.parametrize(
    "model", ["/no/such/directory", "a/b/c", "./missing", "../missing", "org/", "a b", "file:x", ""]
)
def test_a_model_that_is_neither_directory_nor_hub_id(model):
    with pytest.raises(ConfigError, match="neither a directory here nor a hub id"):
        ModelConfig(model=model)


def test_a_hub_id_that_is_not_there_is_an_error_once_it_is_read():
    model_config = ModelConfig(model="no-such-org/no-such-model", revision="main")
    with pytest.raises(ConfigError, match="can't read the config of model 'no-such-org/no-such-model'"):
        _ = model_config.hf_config


def test_an_unknown_option_is_an_error(llava):
    with pytest.raises(TypeError, match="max_len"):
        ModelConfig(model=llava, max_len=3)
    with pytest.raises(TypeError, match="max_seqs"):
        EngineConfig(max_seqs=3)


def test_model_config_is_a_frozen_value(llava):
    limits, sizes = {"image": 2}, {"size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5]}
    model_config = ModelConfig(model=llava, limit_mm_per_prompt=limits, mm_processor_kwargs=sizes)
    limits["image"] = 7
    sizes["size"]["height"] = 7
    sizes["image_mean"].append(7)
    assert model_config.limit_for("image") == 2
    assert model_config.limit_for("video") == 1
    assert model_config.mm_processor_kwargs["size"]["height"] == 28
    assert model_config.mm_processor_kwargs["image_mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config.seed = 3
    with pytest.raises(ValueError, match="FrozenDict is immutable"):
        model_config.limit_mm_per_prompt["image"] = 3
    with pytest.raises(TypeError):
        ModelConfig(llava)
    assert model_config == ModelConfig(model=str(llava), limit_mm_per_prompt={"image": 2}, mm_processor_kwargs={
        "size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5]})  # fmt: skip


def test_defaults_name_the_shipped_model():
    assert shipped_model_path().parts[-3:] == ("aphrodite_jax", "assets", "tiny_llava")
    if shipped_model_path().is_dir():
        model_config = ModelConfig()
        assert model_config.model == model_config.tokenizer == str(shipped_model_path())
        assert isinstance(model_config.hf_config, transformers.LlavaConfig)


def test_the_tokenizer_is_the_models_unless_it_is_given(llava, tmp_path):
    assert ModelConfig(model=llava).tokenizer == str(llava)
    assert ModelConfig(model=llava, tokenizer=tmp_path).tokenizer == str(tmp_path)


def test_the_hugging_face_config_and_its_text_part(llava):
    model_config = ModelConfig(model=llava)
    assert isinstance(model_config.hf_config, transformers.LlavaConfig)
    assert isinstance(model_config.hf_text_config, transformers.LlamaConfig)
    assert model_config.hf_config is model_config.hf_config
    text = ModelConfig(model=llava_files.write_config(llava.parent / "text", llava_files.text_config()))
    assert text.hf_text_config is text.hf_config


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b"",
        b"\xff\xfe\x00",
        b'{"model_type": "no-such-type"}',
        b'{"model_type": "llama", "hidden_size": "wide"}',
        b'{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 3}',
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="can't read the config of model"):
        _ = ModelConfig(model=tmp_path).hf_config


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json: not a Hugging Face checkpoint directory"):
        _ = ModelConfig(model=tmp_path).hf_config


def test_overrides_reach_nested_fields(llava):
    overrides = {
        "vision_feature_select_strategy": "full",
        "text_config": {
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        },
    }
    config = ModelConfig(model=llava, hf_overrides=overrides).hf_config
    assert config.vision_feature_select_strategy == "full"
    assert config.text_config.max_position_embeddings == 512
    assert config.text_config.rope_parameters == overrides["text_config"]["rope_parameters"]
    assert type(config.text_config.rope_parameters) is dict
    assert config.text_config.hidden_size == llava_files.WIDTH  # what is not named stays
    config.text_config.rope_parameters["factor"] = 1.0
    assert overrides["text_config"]["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_sise": 3}, "hf_overrides: the config LlavaConfig has no field 'hidden_sise'"),
        ({"text_config": {"hidden_sise": 3}}, r"hf_overrides\['text_config'\]: the config LlamaConfig has no field"),
        ({"to_dict": 3}, "has no field 'to_dict'"),
        ({"text_config": {"hidden_size": "wide"}}, r"hf_overrides\['text_config'\]: 'hidden_size' can't be 'wide'"),
    ],
)
def test_overrides_that_do_not_fit(llava, overrides, message):
    with pytest.raises(ConfigError, match=message):
        _ = ModelConfig(model=llava, hf_overrides=overrides).hf_config


def test_context_length(llava, tmp_path):
    assert ModelConfig(model=llava).context_length == 128
    assert ModelConfig(model=llava, max_model_len=128).context_length == 128
    assert ModelConfig(model=llava, max_model_len=100).context_length == 100
    with pytest.raises(ConfigError, match="max_model_len 129 is above the 128 positions"):
        _ = ModelConfig(model=llava, max_model_len=129).context_length
    longer = {"text_config": {"max_position_embeddings": 256}}
    assert ModelConfig(model=llava, max_model_len=129, hf_overrides=longer).context_length == 129
    bloom = llava_files.write_config(tmp_path / "bloom", {"model_type": "bloom"})
    with pytest.raises(ConfigError, match="has no length limit; give max_model_len"):
        _ = ModelConfig(model=bloom).context_length
    assert ModelConfig(model=bloom, max_model_len=64).context_length == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: value}, f"{name} must be a whole number of at least 1, got {value!r}")
            for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "encoder_cache_tokens")
            for value in (0, -1, 1.0, True, "8")
        ),
        ({"max_num_seqs": None}, "max_num_seqs must be a whole number"),
        ({"page_size": None}, "page_size must be a whole number"),
        ({"on_recompile": "ignore"}, "on_recompile must be 'warn' or 'raise', got 'ignore'"),
        ({"programs_dir": "gs://bucket/programs"}, "programs_dir must be a directory of this machine, got 'gs://bucket"),
        ({"memory_fraction": 0}, "memory_fraction must be in"),
        ({"memory_fraction": 1.01}, "memory_fraction must be in"),
        ({"memory_fraction": float("nan")}, "memory_fraction must be in"),
        ({"memory_fraction": "half"}, "memory_fraction must be in"),
        ({"memory_fraction": True}, "memory_fraction must be in"),
        ({"warm_up": "no"}, "warm_up must be True or False, got 'no'"),
        ({"show_progress": 1}, "show_progress must be True or False, got 1"),
        *(
            ({"kv_cache_memory": value}, "a size in bytes is a number of at least 1 or text such as '512MiB'")
            for value in (0, -5, "0", "0GB", "0.1", "12 parsecs", "", "MiB", "-1GiB", "1e9", "inf", "nan", True, [1])
        ),
    ],
)  # fmt: skip
def test_engine_config_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (1, 1),
        ("1", 1),
        (2**40, 2**40),
        ("512MiB", 512 * 2**20),
        ("512 MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("512MB", 512 * 10**6),
        ("512M", 512 * 10**6),
        (" 1.5 GiB ", 3 * 2**29),
        ("2 GB", 2 * 10**9),
        ("3k", 3000),
        ("1KiB", 1024),
        ("1TiB", 2**40),
        ("64B", 64),
        ("0.5KiB", 512),
    ],
)
def test_sizes_in_bytes(given, size):
    assert EngineConfig(kv_cache_memory=given).kv_cache_memory == size


def test_engine_config_is_frozen():
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 8
    with pytest.raises(TypeError):
        EngineConfig(16)
    assert config == EngineConfig()


def test_numpy_numbers_are_not_taken_for_limits(llava):
    """They would print and hash as something else; the message shows what came."""
    with pytest.raises(ConfigError, match="max_model_len"):
        ModelConfig(model=llava, max_model_len=np.float32(3))


def test_public_names_are_there():
    assert len(set(aphrodite_jax.__all__)) == len(aphrodite_jax.__all__)
    for name in aphrodite_jax.__all__:
        assert getattr(aphrodite_jax, name).__name__ == name
        assert name in dir(aphrodite_jax)
    with pytest.raises(AttributeError, match="module 'aphrodite_jax' has no attribute 'no_such_name'"):
        _ = aphrodite_jax.no_such_name
    assert aphrodite_jax.__version__.count(".") == 2


def test_errors_are_one_tree():
    from aphrodite_jax import errors

    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, AphroditeError)
        assert name in errors.__doc__
        assert kind is AphroditeError or issubclass(kind, ValueError | RuntimeError)


def test_public_names_are_imported_when_they_are_used():
    """A command's --help must not wait for JAX; torch is never needed."""
    script = (
        "import sys, json, aphrodite_jax\n"
        "before = [m for m in ('jax', 'flax', 'transformers', 'PIL', 'torch') if m in sys.modules]\n"
        "aphrodite_jax.SamplingParams\n"
        "after = [m for m in ('aphrodite_jax.sampling_params', 'jax', 'torch') if m in sys.modules]\n"
        "print(json.dumps([before, after]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], ["aphrodite_jax.sampling_params"]]


# Sampling options.


def test_sampling_params_are_made_of_others():
    params = SamplingParams(logit_bias={5: -1, 3: 1.0}, stop="x", stop_token_ids=[4], seed=1)
    assert params.logit_bias == ((3, 1.0), (5, -1.0))
    longer = dataclasses.replace(params, max_tokens=5)
    assert (longer.logit_bias, longer.stop, longer.max_tokens) == (params.logit_bias, ("x",), 5)
    assert dataclasses.replace(longer, max_tokens=params.max_tokens) == params
    assert SamplingParams(logit_bias=params.logit_bias).logit_bias == params.logit_bias
    assert dataclasses.replace(SamplingParams(), top_k=2).logit_bias == ()


@pytest.mark.parametrize("bias", ["3", 3, [3, 4], [(3, 1.0, 2)], {"a": 1}, {3: None}, [(3, 1.0), (3, 2.0)], {3: 101}])
def test_a_logit_bias_that_is_none(bias):
    with pytest.raises(ConfigError, match="SamplingParams: logit_bias must be token ids to values in"):
        SamplingParams(logit_bias=bias)
