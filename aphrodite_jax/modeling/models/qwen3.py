"""Qwen3: Qwen2's decoder without biases, and with a norm on each head's queries and keys.

https://arxiv.org/abs/2505.09388
"""

from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.modeling.models.llama import LlamaAttention, LlamaDecoderLayer
from aphrodite_jax.modeling.models.qwen2 import Qwen2ForCausalLM

__all__ = ["NormedAttention", "Qwen3DecoderLayer", "Qwen3ForCausalLM"]


class NormedAttention(LlamaAttention):
    """Llama's attention with a norm on each head of queries and keys before they are turned."""

    norm_class: type = nnx.RMSNorm

    def _make_projections(self, config, **kw):
        super()._make_projections(config, **kw)
        kw = {name: value for name, value in kw.items() if name != "use_bias"}
        self.q_norm = self.norm_class(self.head_dim, epsilon=config.rms_norm_eps, **kw)
        self.k_norm = self.norm_class(self.head_dim, epsilon=config.rms_norm_eps, **kw)

    def project(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T N H"], ...]:
        """Queries, keys and values by head, the first two normed."""
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """Llama's with normed heads."""

    attention_class = NormedAttention


class Qwen3ForCausalLM(Qwen2ForCausalLM):
    """Qwen3 as a language model; some of its layers may have a window, as in Qwen2."""

    traits = ("normed heads of queries and keys", "window in some layers")

    layer_class = Qwen3DecoderLayer

    @staticmethod
    def attention_biases(config) -> tuple[bool, bool]:
        """All projections have a bias, or none, as the config says."""
        return config.attention_bias, config.attention_bias
