"""Bytes of a page: what the arrays of a page really take on the platform."""

import jax.numpy as jnp
import pytest
import transformers

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.executor.model_programs import ModelPrograms, device_bytes
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.models.mistral import MistralForCausalLM


@pytest.mark.parametrize(("platform", "width"), [("cpu", 160), ("tpu", 256)])
def test_bytes_of_a_page_count_its_width(tmp_path, platform, width):
    config = transformers.MistralConfig(
        architectures=["MistralForCausalLM"], vocab_size=96, hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=80, max_position_embeddings=128,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    programs = ModelPrograms(
        abstract_model(MistralForCausalLM, config, jnp.bfloat16),
        ModelConfig(model=tmp_path),
        EngineConfig(page_size=16),
        media_budget=0,
        max_num_batched_tokens=64,
        platform=platform,
    )
    layers, heads, tokens, itemsize = 3, 2, 160, 2
    assert device_bytes(programs.arrays(10).kv_caches) == layers * heads * tokens * width * itemsize
