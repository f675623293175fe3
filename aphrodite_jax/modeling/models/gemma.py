"""Gemma and Gemma 2: Llama's decoder with scaled embeddings, norms around one, and soft caps in the second.

https://arxiv.org/abs/2403.08295 and https://arxiv.org/abs/2408.00118
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.modeling.models.llama import LlamaDecoderLayer, LlamaForCausalLM, masks_of_layer_types

__all__ = ["Gemma2ForCausalLM", "GemmaForCausalLM", "GemmaRMSNorm"]


class GemmaRMSNorm(nnx.RMSNorm):
    """Root mean square norm (https://arxiv.org/abs/1910.07467) in float32; the weight is what the factor has over 1."""

    def __init__(self, width: int, *, epsilon: float, dtype, param_dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(width, epsilon=epsilon, scale_init=nnx.initializers.zeros, **kw)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Each row over its root mean square, times the factor."""
        rows = x.astype(jnp.float32)
        rows = rows * jax.lax.rsqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + self.epsilon)
        assert self.scale is not None, "the base class makes one unless it is told not to"
        factor = 1 + self.scale[...].astype(jnp.float32)
        return (rows * jnp.broadcast_to(factor, rows.shape)).astype(x.dtype)


class GemmaDecoderLayer(LlamaDecoderLayer):
    """Llama's with Gemma's norm."""

    norm_class = GemmaRMSNorm


class Gemma2DecoderLayer(GemmaDecoderLayer):
    """Attention and feed-forward, each between two norms; scores are capped."""

    def __init__(self, config, *, mask: str, qkv_bias: bool, out_bias: bool, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        super().__init__(config, mask=mask, qkv_bias=qkv_bias, out_bias=out_bias, **kw)
        self.pre_feedforward_layernorm = self.norm(config, **kw)
        self.post_feedforward_layernorm = self.norm(config, **kw)

    @staticmethod
    def attention_scaling(config):
        """As the config says."""
        return {"scale": config.query_pre_attn_scalar**-0.5, "soft_cap": config.attn_logit_softcapping}

    def __call__(self, x, rotary, kv_cache, metadata):
        """Hidden states ``[T, D]`` and the cache, as `LlamaDecoderLayer`."""
        attended, kv_cache = self.self_attn(self.input_layernorm(x), rotary, kv_cache, metadata)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), kv_cache


class GemmaForCausalLM(LlamaForCausalLM):
    """Gemma as a language model."""

    traits = ("scaled embeddings", "norms around one")

    layer_class = GemmaDecoderLayer

    @staticmethod
    def mask_specs(config) -> dict[str, MaskSpec]:
        """Causal attention."""
        _require_causal(config)
        return {"full": MaskSpec()}

    def embed_input_ids(self, input_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token embeddings times the root of their width, which is rounded to their dtype first."""
        embeds = super().embed_input_ids(input_ids)
        return embeds * jnp.asarray(self.config.hidden_size**0.5, embeds.dtype)


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma 2 as a language model: every other layer has a window, scores and logits are capped."""

    traits = ("soft caps of scores and logits", "window in every other layer", "norms before and behind")

    layer_class = Gemma2DecoderLayer

    @staticmethod
    def layer_masks(config) -> tuple[str, ...]:
        """As the config's ``layer_types`` say."""
        return masks_of_layer_types(config)

    @staticmethod
    def mask_specs(config) -> dict[str, MaskSpec]:
        """Full causal attention, and the window where a layer has one."""
        _require_causal(config)
        specs = {"full": MaskSpec(), "sliding": MaskSpec(window=config.sliding_window)}
        return {kind: specs[kind] for kind in dict.fromkeys(masks_of_layer_types(config))}

    def compute_logits(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Next-token logits, in float32, softly capped."""
        logits = super().compute_logits(hidden_states)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else jnp.tanh(logits / cap) * cap


def _require_causal(config) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise ConfigError(
            f"use_bidirectional_attention=True of a {config.model_type} is not supported: it makes an encoder of "
            "the model, which has no next token"
        )
