"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from typing import Any

from aphrodite_jax.testing.strategies import images, videos
from aphrodite_jax.testing.tiny.model import LLAMA, TEXT, TOWER, TinyModel, processor_file, special_tokens, tiny_model

__all__ = ["llava", "llava_next", "llava_onevision"]

SIDE = 28
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
ONE_SIZE: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "resample": 3}


def llava() -> TinyModel:
    """LLaVA-1.5 over CLIP and Llama."""
    tokens = special_tokens("<image>")
    return tiny_model(
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava",
            "vision_config": CLIP,
            "text_config": LLAMA,
            "image_token_index": tokens["<image>"],
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        traits=("images of one size", "the default mapper"),
        tokens=tokens,
        files=processor_file("CLIPImageProcessor", do_center_crop=False, **ONE_SIZE),
        strategies={"image": images(most=40)},
    )


def llava_next() -> TinyModel:
    """LLaVA-NeXT over CLIP and Mistral."""
    tokens = special_tokens("<image>")
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return tiny_model(
        "LlavaNextForConditionalGeneration",
        {
            "model_type": "llava_next",
            "vision_config": CLIP,
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": 8},
            "image_token_index": tokens["<image>"],
            "image_grid_pinpoints": pinpoints,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        traits=("tiles", "rows padded to a few numbers", "a window in all layers"),
        tokens=tokens,
        files=processor_file(
            "LlavaNextImageProcessor",
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=pinpoints,
            resample=3,
            do_pad=True,
        ),
        strategies={"image": images(most=90)},
    )


def llava_onevision() -> TinyModel:
    """LLaVA-OneVision over SigLIP and Qwen2."""
    tokens = special_tokens("<image>", "<video>")
    pinpoints = [[SIDE * rows, SIDE * columns] for rows in (1, 2) for columns in (1, 2)]
    return tiny_model(
        "LlavaOnevisionForConditionalGeneration",
        {
            "model_type": "llava_onevision",
            "vision_config": SIGLIP,
            "text_config": {"model_type": "qwen2", **TEXT, "max_position_embeddings": 256},
            "image_token_index": tokens["<image>"],
            "video_token_index": tokens["<video>"],
            "image_grid_pinpoints": pinpoints,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
        traits=("tiles", "tiles and rows padded to a few numbers", "videos"),
        tokens=tokens,
        files={
            **processor_file("LlavaOnevisionImageProcessor", image_grid_pinpoints=pinpoints, **ONE_SIZE),
            "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor", **ONE_SIZE},
        },
        strategies={"image": images(most=90), "video": videos(most_frames=10, most=40)},
    )
