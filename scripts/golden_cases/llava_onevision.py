"""LLaVA-OneVision: pictures of tiles that are made smaller, and videos of pooled frames."""

import json
from pathlib import Path

import checkpoints
import numpy as np
import torch
import transformers
from PIL import Image

from golden_cases import Case, load_image_processor
from golden_cases.llava import SIGLIP, llava
from golden_cases.text import QWEN2

TILE = 35
"""Pixels of a tile's side: five patches, so that half of them is none."""
VIDEO = 158
PINPOINTS = [[TILE * rows, TILE * columns] for rows in range(1, 4) for columns in range(1, 4)]
HUB_NAMES = (
    (r"^model\.image_newline", "image_newline"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def llava_onevision(text: dict, **fields) -> dict:
    return llava(
        SIGLIP | {"image_size": TILE, "vision_use_head": False},
        text | {"max_position_embeddings": 512},
        **{
            "model_type": "llava_onevision",
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "image_grid_pinpoints": PINPOINTS,
            "video_token_index": VIDEO,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_1",
            **fields,
        },
    )


FILES = {
    "preprocessor_config.json": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": TILE, "width": TILE},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.3, 0.2, 0.1],
    },
}


def reference_processor(directory: Path) -> transformers.LlavaOnevisionProcessor:
    """Hugging Face's processor, for its counts of tokens alone: to be made whole it needs torchvision."""
    config = json.loads((directory / "config.json").read_text())
    processor = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    processor.image_processor = load_image_processor(directory)
    processor.num_image_tokens = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    for field in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        setattr(processor, field, config[field])
    processor.image_token, processor.video_token = "<image>", "<video>"
    return processor


def video_pixels(directory: Path, video: np.ndarray) -> torch.Tensor:
    """Frames resized and scaled as the video processor's file says, by Hugging Face's processor of single images."""
    options = json.loads((directory / "video_preprocessor_config.json").read_text())
    processor = transformers.SiglipImageProcessorPil(
        **{name: options[name] for name in ("size", "image_mean", "image_std")}
    )
    return processor(images=list(map(Image.fromarray, video)), return_tensors="pt")["pixel_values"]


def reference_inputs(
    directory: Path, prompt: list[int], pictures: list[np.ndarray], videos: list[np.ndarray]
) -> tuple[list[int], dict]:
    """As `Case.reference_inputs`; images come in one flat list, as single ones."""
    processor = reference_processor(directory)
    counts, inputs = {}, {}
    if pictures:
        inputs |= processor.image_processor(images=list(map(Image.fromarray, pictures)), return_tensors="pt")
        found = [processor.replace_image_token(inputs, index).count("<image>") for index in range(len(pictures))]
        counts[checkpoints.IMAGE_TOKEN] = iter(found)
    if videos:
        inputs["pixel_values_videos"] = torch.stack([video_pixels(directory, video) for video in videos])
        found = [processor.replace_video_token(inputs, index).count("<video>") for index in range(len(videos))]
        counts[VIDEO] = iter(found)
    return [token for token in prompt for _ in range(next(counts[token]) if token in counts else 1)], inputs


_ANYRES = llava_onevision(QWEN2)
_LAYERS = llava_onevision(
    QWEN2 | {"tie_word_embeddings": True}, vision_feature_layer=[-2, 1], vision_aspect_ratio="anyres_max_3"
)


def case(config: dict, prompts: tuple, unlike: dict) -> Case:
    return Case(
        config=config,
        prompts=prompts,
        unlike=unlike,
        reference_inputs=reference_inputs,
        files=FILES,
        special_tokens={"<video>": VIDEO},
        placeholders={"video": VIDEO},
        hub_names=HUB_NAMES,
    )


CASES = {
    "llava_onevision": case(
        _ANYRES,
        (
            (12, []),
            (12, [(70, 100)]),
            (12, [(40, 30)], [(3, 40, 50)]),
            (14, [(30, 33), (36, 60), (20, 70)]),
        ),
        _ANYRES | {"projector_hidden_act": "relu"},
    ),
    "llava_onevision_layers": case(
        _LAYERS,
        ((12, []), (12, [(36, 90)]), (12, [], [(2, 30, 60), (2, 20, 20)])),
        _LAYERS | {"vision_feature_layer": [-1, 1]},
    ),
}
