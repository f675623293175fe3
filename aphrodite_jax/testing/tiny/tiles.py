"""Idefics3, SmolVLM and InternVL: images cut into tiles, whose names stand between their rows."""

from aphrodite_jax.testing.strategies import images, videos
from aphrodite_jax.testing.tiny.model import LLAMA, TEXT, TOWER, TinyModel, processor_file, special_tokens, tiny_model

__all__ = ["idefics3", "internvl", "smolvlm"]

SIDE = 28
TILE_NAMES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))


def idefics3() -> TinyModel:
    """Idefics3 over its tower and Llama."""
    return _idefics3("idefics3", "Idefics3", tile=SIDE)


def smolvlm() -> TinyModel:
    """SmolVLM, whose tiles have pixels that fill no patch."""
    return _idefics3("smolvlm", "SmolVLM", tile=SIDE + 3)


def _idefics3(name: str, family: str, *, tile: int) -> TinyModel:
    tokens = special_tokens("<image>", "<fake_token_around_image>", "<global-img>", *TILE_NAMES)
    return tiny_model(
        f"{family}ForConditionalGeneration",
        {
            "model_type": name,
            "vision_config": {"model_type": f"{name}_vision", **TOWER, "patch_size": 7},
            "text_config": LLAMA,
            "image_token_id": tokens["<image>"],
            "scale_factor": 2,
        },
        traits=("tiles, with their names between the rows", "patches put together"),
        tokens=tokens,
        files=processor_file(
            f"{family}ImageProcessor",
            size={"longest_edge": 2 * tile},
            max_image_size={"longest_edge": tile},
            resample=1,
            do_image_splitting=True,
            do_pad=True,
        ),
        strategies={"image": images(most=90)},
    )


def internvl() -> TinyModel:
    """InternVL over its tower and Qwen2."""
    tokens = special_tokens("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
    tower = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
    size = {"height": SIDE, "width": SIDE}
    return tiny_model(
        "InternVLForConditionalGeneration",
        {
            "model_type": "internvl",
            "vision_config": {
                "model_type": "internvl_vision",
                **tower,
                "image_size": [SIDE, SIDE],
                "patch_size": [7, 7],
                "attention_bias": True,
            },
            "text_config": {"model_type": "qwen2", **TEXT, "max_position_embeddings": 512},
            "image_token_id": tokens["<IMG_CONTEXT>"],
            "downsample_ratio": 0.5,
        },
        traits=("tiles, padded to a few numbers", "patches put together", "videos of named frames"),
        tokens=tokens,
        placeholders={"video": tokens["<video>"]},
        files={
            **processor_file("GotOcr2ImageProcessor", size=size, max_patches=2),
            "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", "size": size},
        },
        strategies={"image": images(most=90), "video": videos(most_frames=8, most=40)},
    )
