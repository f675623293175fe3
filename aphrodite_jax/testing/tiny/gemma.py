"""PaliGemma over Gemma and Gemma 2, and Gemma 3."""

from typing import Any

from aphrodite_jax.testing.strategies import images
from aphrodite_jax.testing.tiny.llava import ONE_SIZE, SIGLIP
from aphrodite_jax.testing.tiny.model import TEXT, TinyModel, processor_file, special_tokens, tiny_model

__all__ = ["gemma3", "paligemma", "paligemma2"]

WINDOW = 6
TWO_KINDS = ["sliding_attention", "full_attention"]
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    **TEXT,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": TWO_KINDS,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
}


def paligemma() -> TinyModel:
    """PaliGemma over SigLIP and Gemma."""
    return _paligemma({"model_type": "gemma", **TEXT}, traits=("prefix-LM prompts",))


def paligemma2() -> TinyModel:
    """PaliGemma 2 over SigLIP and Gemma 2."""
    return _paligemma(GEMMA2, traits=("prefix-LM prompts", "windows in half of the layers", "soft caps"))


def _paligemma(text: dict[str, Any], *, traits: tuple[str, ...]) -> TinyModel:
    tokens = special_tokens("<image>")
    return tiny_model(
        "PaliGemmaForConditionalGeneration",
        {
            "model_type": "paligemma",
            "vision_config": SIGLIP,
            "text_config": text,
            "image_token_index": tokens["<image>"],
            "projection_dim": text["hidden_size"],
        },
        traits=traits,
        tokens=tokens,
        files=processor_file("SiglipImageProcessor", **ONE_SIZE),
        strategies={"image": images(most=40)},
    )


def gemma3() -> TinyModel:
    """Gemma 3 over SigLIP, with pan and scan."""
    tokens = special_tokens("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return tiny_model(
        "Gemma3ForConditionalGeneration",
        {
            "model_type": "gemma3",
            "vision_config": SIGLIP | {"patch_size": 7},
            "text_config": {
                "model_type": "gemma3_text",
                **TEXT,
                "max_position_embeddings": 512,
                "query_pre_attn_scalar": 8,
                "sliding_window": WINDOW,
                "layer_types": TWO_KINDS,
                "rope_parameters": {
                    "sliding_attention": rope,
                    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
                },
            },
            "image_token_index": tokens["<image_soft_token>"],
            "boi_token_index": tokens["<start_of_image>"],
            "eoi_token_index": tokens["<end_of_image>"],
            "mm_tokens_per_image": 4,
        },
        traits=("image spans that see themselves", "windows in half of the layers", "crops, with words between"),
        tokens=tokens,
        placeholders={"image": tokens["<start_of_image>"]},
        files=processor_file(
            "Gemma3ImageProcessor",
            do_pan_and_scan=True,
            pan_and_scan_min_crop_size=14,
            pan_and_scan_max_num_crops=2,
            pan_and_scan_min_ratio_to_activate=1.5,
            **ONE_SIZE,
        ),
        strategies={"image": images(most=40)},
    )
