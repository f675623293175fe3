"""Qwen2: Llama's decoder with biased queries, keys and values, and a window in some layers.

https://arxiv.org/abs/2407.10671
"""

from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM, masks_of_layer_types

__all__ = ["Qwen2ForCausalLM"]


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 as a language model."""

    traits = ("biased queries, keys and values", "window in some layers")

    @staticmethod
    def layer_masks(config) -> tuple[str, ...]:
        """As the config's ``layer_types`` say."""
        return masks_of_layer_types(config)

    @staticmethod
    def mask_specs(config) -> dict[str, MaskSpec]:
        """Full causal attention, and the window where a layer has one."""
        specs = {"full": MaskSpec(), "sliding": MaskSpec(window=config.sliding_window)}
        return {kind: specs[kind] for kind in dict.fromkeys(masks_of_layer_types(config))}

    @staticmethod
    def attention_biases(config) -> tuple[bool, bool]:
        """Queries, keys and values have biases, the output has none."""
        return True, False
