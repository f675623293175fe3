"""LLaVA over Pixtral's tower, and Mistral 3: images at their own size, with a token behind each line of them."""

import json
from pathlib import Path

import checkpoints
import numpy as np
from PIL import Image

from golden_cases import Case, load_image_processor
from golden_cases.text import MISTRAL

TEXT = MISTRAL | {"sliding_window": None, "max_position_embeddings": 512}
LARGEST = 120
"""Pixels of the longer side of an image at most."""
SPECIAL_TOKENS = {"[IMG_BREAK]": checkpoints.IMAGE_TOKEN - 1, "[IMG_END]": checkpoints.IMAGE_TOKEN - 2}


def tower(**fields) -> dict:
    return {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": LARGEST,
        "patch_size": 10,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        **fields,
    }


def pixtral(vision: dict, **fields) -> dict:
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vision,
        "text_config": TEXT,
        "image_token_index": checkpoints.IMAGE_TOKEN,
        "image_seq_length": 1,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "dtype": "float32",
        **fields,
    }


def mistral3(vision: dict, **fields) -> dict:
    return {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "vision_config": vision,
        "text_config": TEXT,
        "image_token_index": checkpoints.IMAGE_TOKEN,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **fields,
    }


def processor_files(config: dict) -> dict[str, dict]:
    """Of the image processor, whose patches are the tower's, and of the whole, which tells it how many are merged."""
    patch_size = config["vision_config"]["patch_size"]
    return {
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"longest_edge": LARGEST},
            "patch_size": {"height": patch_size, "width": patch_size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "processor_config.json": {
            "processor_class": "PixtralProcessor",
            "patch_size": patch_size,
            "spatial_merge_size": config.get("spatial_merge_size", 1),
            "image_token": "<image>",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
    }


def reference_inputs(directory: Path, prompt: list[int], pictures: list[np.ndarray], videos) -> tuple[list[int], dict]:
    """As `Case.reference_inputs`; Hugging Face's own expansion needs torchvision, so that it is written out here."""
    if not pictures:
        return prompt, {}
    file = json.loads((directory / "processor_config.json").read_text())
    side = file["patch_size"] * file["spatial_merge_size"]
    processor = load_image_processor(directory)
    features = processor(images=list(map(Image.fromarray, pictures)), patch_size=side, return_tensors="pt")
    sizes = iter(features["image_sizes"].tolist())
    expanded = []
    for token in prompt:
        if token != checkpoints.IMAGE_TOKEN:
            expanded.append(token)
            continue
        height, width = next(sizes)
        for line in range(height // side):
            is_last = line == height // side - 1
            end = SPECIAL_TOKENS["[IMG_END]" if is_last else "[IMG_BREAK]"]
            expanded += [checkpoints.IMAGE_TOKEN] * (width // side) + [end]
    return expanded, dict(features)


def case(config: dict, *, unlike: dict) -> Case:
    return Case(
        config=config,
        # An image that is made smaller; a thin one, one of whole patches, one of two lines.
        prompts=((12, []), (12, [(150, 90)]), (14, [(28, 84), (60, 40), (20, 24)])),
        unlike=unlike,
        reference_inputs=reference_inputs,
        files=processor_files(config),
        special_tokens=SPECIAL_TOKENS,
        hub_names=(
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
        ),
    )


_MERGED = tower(patch_size=5, intermediate_size=64, hidden_act="gelu")

CASES = {
    "pixtral": case(
        pixtral(tower()),
        unlike=pixtral(tower(rope_parameters={"rope_type": "axial", "rope_theta": 100.0})),
    ),
    "mistral3": case(mistral3(_MERGED), unlike=mistral3(_MERGED, vision_feature_layer=-2)),
}
