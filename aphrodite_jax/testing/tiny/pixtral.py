"""LLaVA over Pixtral's tower, and Mistral 3."""

from typing import Any

from aphrodite_jax.testing.strategies import images
from aphrodite_jax.testing.tiny.model import TEXT, TinyModel, processor_file, special_tokens, tiny_model

__all__ = ["mistral3", "pixtral"]

LARGEST = 90
"""Pixels of the longer side of an image at most."""


def pixtral() -> TinyModel:
    """Pixtral over its tower and Mistral."""
    fields = {"model_type": "llava", "vision_feature_select_strategy": "full"}
    return _pixtral("LlavaForConditionalGeneration/pixtral", fields, patch_size=10, merge=1)


def mistral3() -> TinyModel:
    """Mistral 3, whose rows are squares of patches."""
    fields = {"model_type": "mistral3", "multimodal_projector_bias": False, "spatial_merge_size": 2}
    return _pixtral("Mistral3ForConditionalGeneration", fields, patch_size=9, merge=2)


def _pixtral(architecture: str, fields: dict[str, Any], *, patch_size: int, merge: int) -> TinyModel:
    tokens = special_tokens("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return tiny_model(
        architecture,
        {
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_channels": 3,
                "image_size": LARGEST,
                "patch_size": patch_size,
                "hidden_act": "silu",
                "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
            },
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None, "max_position_embeddings": 256},
            "image_token_index": tokens["[IMG]"],
            "vision_feature_layer": -1,
            **fields,
        },
        traits=(
            "images at their own size and shape",
            "patches padded to a few numbers",
            "tokens at the ends of lines",
            *(("squares of patches",) if merge > 1 else ()),
        ),
        tokens=tokens,
        files={
            **processor_file(
                "PixtralImageProcessor",
                size={"longest_edge": LARGEST},
                patch_size={"height": patch_size, "width": patch_size},
                resample=3,
            ),
            "processor_config.json": {
                "processor_class": "PixtralProcessor",
                "patch_size": patch_size,
                "spatial_merge_size": merge,
                "image_token": "[IMG]",
                "image_break_token": "[IMG_BREAK]",
                "image_end_token": "[IMG_END]",
            },
        },
        strategies={"image": images(least=2, most=120)},
    )
