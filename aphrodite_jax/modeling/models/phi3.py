"""Phi-3 and Phi-4 mini: Llama's decoder with joined projections, a part of each head turned, and a window.

https://arxiv.org/abs/2404.14219
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.models.llama import LlamaAttention, LlamaDecoderLayer
from aphrodite_jax.modeling.models.mistral import MistralForCausalLM

__all__ = ["Phi3ForCausalLM"]


class Phi3Attention(LlamaAttention):
    """Llama's attention; queries, keys and values come from one projection, in this order."""

    def _make_projections(self, config, **kw):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.splits = (heads * self.head_dim, (heads + kv_heads) * self.head_dim)
        self.qkv_proj = nnx.Linear(config.hidden_size, (heads + 2 * kv_heads) * self.head_dim, **kw)

    def project(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T N H"], ...]:
        """Queries, keys and values by head."""
        parts = jnp.split(self.qkv_proj(x), self.splits, axis=-1)
        return tuple(part.reshape(len(x), -1, self.head_dim) for part in parts)


class Phi3MLP(nnx.Module):
    """Gated feed-forward whose gate and values come from one projection, the gate first."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        kw = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.act = activation(config.hidden_act)
        self.gate_up_proj = nnx.Linear(width, 2 * inner, **kw)
        self.down_proj = nnx.Linear(inner, width, **kw)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The feed-forward of each row."""
        gate, values = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(self.act(gate) * values)


class Phi3DecoderLayer(LlamaDecoderLayer):
    """Llama's with joined projections."""

    attention_class = Phi3Attention
    mlp_class = Phi3MLP


class Phi3ForCausalLM(MistralForCausalLM):
    """Phi-3 as a language model; its window, like Mistral's, is in every layer."""

    traits = ("joined projections", "a part of each head turns", "window in every layer")

    layer_class = Phi3DecoderLayer
