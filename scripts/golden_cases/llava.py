"""LLaVA-1.5 and LLaVA-NeXT over CLIP and SigLIP."""

import json
from pathlib import Path

import checkpoints
import numpy as np
import torch
import transformers
from PIL import Image

from golden_cases import Case, load_image_processor
from golden_cases.text import LLAMA, MISTRAL, QWEN2

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": checkpoints.IMAGE_SIZE,
    "patch_size": 7,
    "num_channels": 3,
}
CLIP = {"model_type": "clip_vision_model", **TOWER, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = {
    "model_type": "siglip_vision_model",
    **TOWER,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def llava(tower: dict, text: dict, **fields) -> dict:
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": tower,
        "text_config": text,
        "image_token_index": checkpoints.IMAGE_TOKEN,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "dtype": "float32",
        **fields,
    }


def llava_next(tower: dict, text: dict) -> dict:
    size = tower["image_size"]
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size], [3 * size, size], [size, 3 * size]]
    return llava(
        tower,
        text | {"max_position_embeddings": 512},
        model_type="llava_next",
        architectures=["LlavaNextForConditionalGeneration"],
        image_grid_pinpoints=pinpoints,
    )


_CASES = {
    **{
        f"llava_{tower}_{text}": (
            llava({"clip": CLIP, "siglip": SIGLIP}[tower], text_config),
            [(12, 0), (12, 1), (14, 3)],
        )
        for tower in ("clip", "siglip")
        for text, text_config in (("llama", LLAMA), ("mistral", MISTRAL), ("qwen2", QWEN2))
    },
    "llava_clip_qwen2_tied": (llava(CLIP, QWEN2 | {"tie_word_embeddings": True}), [(12, 1)]),
    "llava_clip_llama_tied_above": (llava(CLIP, LLAMA, tie_word_embeddings=True), [(12, 1)]),
    "llava_clip_full_layer_1": (
        llava(CLIP, LLAMA, vision_feature_select_strategy="full", vision_feature_layer=1),
        [(12, 1)],
    ),
    "llava_clip_layers": (llava(CLIP, LLAMA, vision_feature_layer=[0, -1, 2]), [(12, 1)]),
    "llava_siglip_full_last": (
        llava(SIGLIP, LLAMA, vision_feature_select_strategy="full", vision_feature_layer=-1),
        [(12, 1)],
    ),
    **{
        f"llava_next_{name}": (
            llava_next(CLIP, text),
            [(12, 0), (12, [(40, 100)]), (14, [(28, 84), (60, 36), (20, 24)])],
        )
        for name, text in (("mistral", MISTRAL), ("llama", LLAMA))
    },
    "llava_projector": (
        llava(CLIP, LLAMA, multimodal_projector_bias=False, projector_hidden_act="gelu_pytorch_tanh"),
        [(12, 1)],
    ),
}
_UNLIKE = {
    "llava_clip_mistral": llava(CLIP, MISTRAL | {"sliding_window": None}),
    "llava_siglip_mistral": llava(SIGLIP, MISTRAL | {"sliding_window": None}),
    "llava_projector": llava(CLIP, LLAMA, multimodal_projector_bias=False, projector_hidden_act="quick_gelu"),
}


def rows_per_image(directory: Path, pictures: list[np.ndarray]) -> list[int]:
    """Tokens that each image takes."""
    config = json.loads((directory / "config.json").read_text())
    vision, strategy = config["vision_config"], config["vision_feature_select_strategy"]
    class_token = vision["model_type"] == "clip_vision_model"
    if config["model_type"] == "llava":
        rows = (vision["image_size"] // vision["patch_size"]) ** 2 + class_token - (strategy == "default")
        return [rows] * len(pictures)
    image_processor = load_image_processor(directory)
    processor = transformers.LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(class_token),
    )
    inputs = image_processor(images=list(map(Image.fromarray, pictures)), return_tensors="np")
    return [processor.replace_image_token(inputs, index).count("<image>") for index in range(len(pictures))]


def reference_inputs(directory: Path, prompt: list[int], pictures: list[np.ndarray], videos) -> tuple[list[int], dict]:
    """As `Case.reference_inputs`."""
    if not pictures:
        return prompt, {}
    rows = iter(rows_per_image(directory, pictures))
    expanded = [token for token in prompt for _ in range(next(rows) if token == checkpoints.IMAGE_TOKEN else 1)]
    if json.loads((directory / "config.json").read_text())["model_type"] == "llava":
        return expanded, {"pixel_values": torch.tensor(checkpoints.pixel_values(pictures))}
    processor = load_image_processor(directory)
    return expanded, dict(processor(images=list(map(Image.fromarray, pictures)), return_tensors="pt"))


CASES = {
    name: Case(config=config, prompts=tuple(prompts), unlike=_UNLIKE.get(name), reference_inputs=reference_inputs)
    for name, (config, prompts) in _CASES.items()
}
