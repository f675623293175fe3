"""Llama, and the decoder that Mistral and Qwen2 share with it (https://arxiv.org/abs/2302.13971).

The module tree has Hugging Face's names: ``model.embed_tokens``, ``model.layers.0.self_attn.q_proj`` and so on.
All rows of a batch stand in one axis ``T``; which keys a row sees is told by the attention metadata alone.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache, attend
from aphrodite_jax.modeling.layers.embedding import TokenEmbed
from aphrodite_jax.modeling.layers.rotary import RotaryTable, apply_rotary, rotary_table
from aphrodite_jax.modeling.layers.stack import call_layer
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.interfaces import MaskSpec

__all__ = ["LlamaDecoderLayer", "LlamaForCausalLM", "head_dim_of", "masks_of_layer_types"]


class LlamaAttention(nnx.Module):
    """Self-attention with grouped heads and rotary positions, under one mask kind."""

    def __init__(
        self,
        config,
        *,
        mask: str,
        qkv_bias: bool,
        out_bias: bool,
        dtype,
        rngs: nnx.Rngs,
        scale: float | None = None,
        soft_cap: float | None = None,
    ):
        heads, head_dim = config.num_attention_heads, head_dim_of(config)
        self.mask, self.head_dim, self.scale, self.soft_cap = mask, head_dim, scale, soft_cap
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self._make_projections(config, use_bias=qkv_bias, **kw)
        self.o_proj = nnx.Linear(heads * head_dim, config.hidden_size, use_bias=out_bias, **kw)

    def _make_projections(self, config, **kw):
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nnx.Linear(width, heads * self.head_dim, **kw)
        self.k_proj = nnx.Linear(width, kv_heads * self.head_dim, **kw)
        self.v_proj = nnx.Linear(width, kv_heads * self.head_dim, **kw)

    def project(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T N H"], ...]:
        """Queries, keys and values by head, before they are turned."""
        return tuple(
            projection(x).reshape(len(x), -1, self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

    def __call__(
        self,
        x: Float[Array, "T D"],
        rotary: RotaryTable,
        kv_cache: KVCache | None,
        metadata: AttentionMetadata,
    ) -> tuple[Float[Array, "T D"], KVCache | None]:
        """The layer's output and its cache with these rows written."""
        q, k, v = self.project(x)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        out, kv_cache = attend(q, k, v, kv_cache, metadata, mask=self.mask, scale=self.scale, soft_cap=self.soft_cap)
        return self.o_proj(out.reshape(len(x), -1)), kv_cache


class LlamaMLP(nnx.Module):
    """Gated feed-forward (SwiGLU and its kin, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        bias = getattr(config, "mlp_bias", False)
        kw = {"use_bias": bias, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.act = activation(getattr(config, "hidden_act", None) or config.hidden_activation)
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The feed-forward of each row."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nnx.Module):
    """Attention and feed-forward, each after a norm and added to what came in.

    Families with other layers subclass it: ``norm_class`` is that of the whole model.
    """

    norm_class: type = nnx.RMSNorm
    attention_class: type[LlamaAttention] = LlamaAttention
    mlp_class: type = LlamaMLP

    def __init__(self, config, *, mask: str, qkv_bias: bool, out_bias: bool, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        scaling = self.attention_scaling(config)
        biases = {"qkv_bias": qkv_bias, "out_bias": out_bias}
        self.self_attn = self.attention_class(config, mask=mask, **biases, **scaling, **kw)
        self.mlp = self.mlp_class(config, **kw)
        self.input_layernorm = self.norm(config, **kw)
        self.post_attention_layernorm = self.norm(config, **kw)

    @staticmethod
    def attention_scaling(config) -> dict[str, float | None]:
        """``scale`` and ``soft_cap`` of the attention's scores; none are one over the root of a head's width."""
        return {}

    @staticmethod
    def rope_parameters(config, mask: str) -> dict:
        """Those of the layers of one mask kind."""
        return config.rope_parameters

    @classmethod
    def norm(cls, config, *, dtype, rngs: nnx.Rngs) -> nnx.Module:
        """A norm of the residual stream's width."""
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        return cls.norm_class(config.hidden_size, epsilon=config.rms_norm_eps, **kw)

    def __call__(self, x, rotary, kv_cache, metadata):
        """Hidden states ``[T, D]`` and the cache, as `LlamaAttention`."""
        attended, kv_cache = self.self_attn(self.input_layernorm(x), rotary, kv_cache, metadata)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv_cache


class LlamaModel(nnx.Module):
    """Embeddings, decoder layers and the last norm."""

    def __init__(
        self,
        config,
        *,
        layer_class: type[LlamaDecoderLayer],
        masks: Sequence[str],
        qkv_bias: bool,
        out_bias: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        kw = {"dtype": dtype, "rngs": rngs}
        self.embed_tokens = TokenEmbed(config.vocab_size, config.hidden_size, param_dtype=dtype, **kw)
        self.layers = nnx.List(
            layer_class(config, mask=mask, qkv_bias=qkv_bias, out_bias=out_bias, **kw) for mask in masks
        )
        self.norm = layer_class.norm(config, **kw)
        self.rope_parameters = {mask: layer_class.rope_parameters(config, mask) for mask in dict.fromkeys(masks)}

    def __call__(self, x, positions, kv_caches, metadata):
        """Hidden states after the last norm from token embeddings ``[T, D]``, and the new caches."""
        lengths = metadata.lengths
        if lengths is None:
            lengths = jnp.full(positions.shape[-1:], positions.shape[-1], jnp.int32)
        tables = {
            mask: rotary_table(self.config, positions, lengths, parameters=parameters)
            for mask, parameters in self.rope_parameters.items()
        }
        new_caches = []
        for index, layer in enumerate(self.layers):
            cache = None if kv_caches is None else kv_caches[index]
            x, cache = call_layer(layer, x, tables[layer.self_attn.mask], cache, metadata)
            new_caches.append(cache)
        return self.norm(x), None if kv_caches is None else tuple(new_caches)


class LlamaForCausalLM(nnx.Module):
    """Llama as a language model; see `aphrodite_jax.modeling.models.interfaces.LanguageModel`.

    Families with the same decoder subclass it and say what differs: the layers, the mask kind of each, the biases.
    """

    traits: tuple[str, ...] = ("every scaling of rotary positions",)

    layer_class: type[LlamaDecoderLayer] = LlamaDecoderLayer

    weight_rules = (
        WeightRule(r".*\.rotary_emb\.inv_freq", None),
        WeightRule(r"((?:model|lm_head)\..*)", r"\1"),
    )

    def __init__(self, config: transformers.PretrainedConfig, *, dtype, rngs: nnx.Rngs):
        self.config = config
        qkv_bias, out_bias = self.attention_biases(config)
        kw = {"dtype": dtype, "rngs": rngs}
        self.model = LlamaModel(
            config,
            layer_class=self.layer_class,
            masks=self.layer_masks(config),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            **kw,
        )
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, param_dtype=dtype, **kw)

    @staticmethod
    def layer_masks(config) -> tuple[str, ...]:
        """Mask kind of each layer."""
        return ("full",) * config.num_hidden_layers

    @staticmethod
    def mask_specs(config) -> dict[str, MaskSpec]:
        """The mask kinds by name."""
        return {"full": MaskSpec()}

    @staticmethod
    def attention_biases(config) -> tuple[bool, bool]:
        """Whether the query, key and value projections have a bias, and whether the output projection has."""
        return config.attention_bias, config.attention_bias

    @staticmethod
    def kv_cache_shapes(config) -> tuple[tuple[int, int], ...]:
        """``(num_kv_heads, head_dim)`` of each layer."""
        return ((config.num_key_value_heads, head_dim_of(config)),) * config.num_hidden_layers

    def embed_input_ids(self, input_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token embeddings."""
        return self.model.embed_tokens(input_ids)

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches with these rows written."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(inputs_embeds, positions, kv_caches, attn_metadata)

    def final_norm(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The norm behind the last layer, of hidden states from between the layers."""
        return self.model.norm(hidden_states)

    def compute_logits(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Next-token logits, in float32."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.attend(hidden_states).astype(jnp.float32)
        return self.lm_head(hidden_states).astype(jnp.float32)


def head_dim_of(config) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def masks_of_layer_types(config) -> tuple[str, ...]:
    """Mask kind of each layer, as the config's ``layer_types`` say."""
    return tuple("sliding" if kind == "sliding_attention" else "full" for kind in config.layer_types)
