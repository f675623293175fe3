"""Mistral: Llama's decoder with a sliding window in every layer (https://arxiv.org/abs/2310.06825)."""

from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM

__all__ = ["MistralForCausalLM"]


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral as a language model."""

    traits = ("window in every layer",)

    @staticmethod
    def mask_specs(config) -> dict[str, MaskSpec]:
        """One kind: a window, or everything before where the config has none."""
        return {"full": MaskSpec(window=config.sliding_window)}

    @staticmethod
    def attention_biases(config) -> tuple[bool, bool]:
        """No biases."""
        return False, False
