"""Phi-3 and Phi-4 mini: Llama's decoder with projections joined in checkpoints, part of each head turned, and a window.

https://arxiv.org/abs/2404.14219
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from aphrodite_jax.modeling.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from aphrodite_jax.modeling.models.mistral import MistralForCausalLM

__all__ = ["Phi3ForCausalLM"]


class Phi3Attention(LlamaAttention):
    """Llama's attention; checkpoints have queries, keys and values as one projection, in this order."""

    joined: ClassVar[Mapping[str, Sequence[str]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


class Phi3MLP(LlamaMLP):
    """Gated feed-forward; checkpoints have gate and values as one projection, the gate first."""

    joined: ClassVar[Mapping[str, Sequence[str]]] = {"gate_up_proj": ("gate_proj", "up_proj")}


class Phi3DecoderLayer(LlamaDecoderLayer):
    """Llama's with projections that checkpoints join."""

    attention_class = Phi3Attention
    mlp_class = Phi3MLP


class Phi3ForCausalLM(MistralForCausalLM):
    """Phi-3 as a language model; its window, like Mistral's, is in every layer."""

    traits = ("joined projections", "a part of each head turns", "window in every layer")

    layer_class = Phi3DecoderLayer
