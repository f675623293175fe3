"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from typing import Any

from aphrodite_jax.testing.strategies import images, videos
from aphrodite_jax.testing.tiny.model import TEXT, TinyModel, processor_file, special_tokens, tiny_model

__all__ = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]

MERGE = LAYER = 2
"""Patches along a side of a square, and frames of a layer."""


def qwen2_vl() -> TinyModel:
    """Qwen2-VL."""
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "hidden_act": "quick_gelu", "patch_size": 7}
    traits = ("images at their own size and shape", "squares padded to a few numbers", "videos", "positions on 3 axes")
    return _qwen_vl("qwen2_vl", "Qwen2VLForConditionalGeneration", vision, traits=traits)


def qwen2_5_vl() -> TinyModel:
    """Qwen2.5-VL."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "hidden_act": "silu",
        "patch_size": 7,
        "window_size": 28,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 25,
    }
    traits = ("windows in the tower", "videos", "positions on 3 axes, of time in seconds")
    return _qwen_vl("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", vision, traits=traits)


def qwen3_vl() -> TinyModel:
    """Qwen3-VL."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 8,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    }
    traits = ("rows wider than hidden states", "videos, with times between the rows", "positions on 3 axes")
    return _qwen_vl("qwen3_vl", "Qwen3VLForConditionalGeneration", vision, traits=traits, least_frames=2)


def _qwen_vl(
    name: str, architecture: str, vision: dict[str, Any], *, traits: tuple[str, ...], least_frames: int = 1
) -> TinyModel:
    tokens = special_tokens("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    square = (MERGE * vision["patch_size"]) ** 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    cut = {
        "patch_size": vision["patch_size"],
        "merge_size": MERGE,
        "temporal_patch_size": LAYER,
        "resample": 3,
    }
    of_images = processor_file("Qwen2VLImageProcessor", size=_sizes(square, 2, 4), **cut)
    of_frames = processor_file("", size=_sizes(square, 2 * least_frames, 4 * least_frames), **cut)
    return tiny_model(
        architecture,
        {
            "model_type": name,
            "vision_config": {
                "model_type": f"{name}_vision",
                "depth": 2,
                "num_heads": 2,
                "in_channels": 3,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": LAYER,
                **vision,
            },
            "text_config": {
                "model_type": f"{name}_text",
                **TEXT,
                "max_position_embeddings": 128,
                "rope_parameters": rope,
            },
            "image_token_id": tokens["<|image_pad|>"],
            "video_token_id": tokens["<|video_pad|>"],
            "vision_start_token_id": tokens["<|vision_start|>"],
            "vision_end_token_id": tokens["<|vision_end|>"],
        },
        traits=traits,
        tokens=tokens,
        files={**of_images, "video_preprocessor_config.json": of_frames["preprocessor_config.json"]},
        strategies={"image": images(most=60), "video": videos(least_frames=least_frames, most_frames=5, most=40)},
    )


def _sizes(square: int, least: int, most: int) -> dict[str, int]:
    """The pixels of so many squares."""
    return {"shortest_edge": least * square, "longest_edge": most * square}
