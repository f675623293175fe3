"""PaliGemma over Gemma 1 and 2, Gemma 3 with and without images."""

import json
from pathlib import Path

import checkpoints
import numpy as np
import torch
from PIL import Image

from golden_cases import Case, load_image_processor
from golden_cases.llava import SIGLIP
from golden_cases.text import GEMMA, GEMMA2

SOFT, BEGIN, END = checkpoints.IMAGE_TOKEN, 157, 158
GEMMA3 = {name: value for name, value in GEMMA2.items() if not name.endswith("softcapping")} | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0},
    },
}
HUB_NAMES = (
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def paligemma(text: dict) -> dict:
    return {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "vision_config": SIGLIP | {"vision_use_head": False},
        "text_config": text | {"tie_word_embeddings": False},
        "image_token_index": SOFT,
        "projection_dim": text["hidden_size"],
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def gemma3(**text) -> dict:
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "vision_config": SIGLIP | {"vision_use_head": False},
        "text_config": GEMMA3 | text,
        "image_token_index": SOFT,
        "boi_token_index": BEGIN,
        "eoi_token_index": END,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def processor(**options) -> dict:
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": checkpoints.IMAGE_SIZE, "width": checkpoints.IMAGE_SIZE},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            **options,
        }
    }


def pixels(directory: Path, pictures: list[np.ndarray]) -> dict:
    return load_image_processor(directory)(images=list(map(Image.fromarray, pictures)), return_tensors="pt")


def paligemma_inputs(directory: Path, prompt: list[int], pictures, videos) -> tuple[list[int], dict]:
    """Images, the beginning of the sequence behind the last of them, text; the tokenizer here has no newline."""
    if not pictures:
        return prompt, {"token_type_ids": torch.zeros((1, len(prompt)), dtype=torch.long)}
    vision = json.loads((directory / "config.json").read_text())["vision_config"]
    rows = (vision["image_size"] // vision["patch_size"]) ** 2
    last = len(prompt) - prompt[::-1].index(SOFT)
    expanded = [token for token in prompt[1:last] for _ in range(rows if token == SOFT else 1)]
    expanded += [prompt[0], *prompt[last:]]
    types = torch.zeros((1, len(expanded)), dtype=torch.long)
    return expanded, {"pixel_values": pixels(directory, pictures)["pixel_values"], "token_type_ids": types}


def gemma3_inputs(directory: Path, prompt: list[int], pictures, videos) -> tuple[list[int], dict]:
    """A run of soft tokens for each view of an image, between its begin and end; unknown words between the views."""
    inputs = pixels(directory, pictures) if pictures else {}
    crops = iter(inputs["num_crops"].tolist() if pictures else ())
    rows = json.loads((directory / "config.json").read_text())["mm_tokens_per_image"]
    view = [BEGIN, *[SOFT] * rows, END]
    before, between = (
        len(text.split()) for text in ("Here is the original image", "and here are some crops to help you see better")
    )
    expanded = []
    for token in prompt:
        count = next(crops) if token == BEGIN else 0
        whole = [0] * before + view + [0] * between + view * count if count else view
        expanded += whole if token == BEGIN else [token]
    types = (torch.tensor([expanded]) == SOFT).long()
    return expanded, {"token_type_ids": types} | ({"pixel_values": inputs["pixel_values"]} if pictures else {})


def gemma3_case(config: dict, prompts: tuple, unlike: dict | None = None, **options) -> Case:
    return Case(
        config=config,
        prompts=prompts,
        unlike=unlike,
        reference_inputs=gemma3_inputs,
        files=processor(**options),
        special_tokens={"<start_of_image>": BEGIN, "<end_of_image>": END},
        placeholders={"image": BEGIN},
        hub_names=HUB_NAMES,
    )


IMAGES = [(28, 28), (40, 60), (84, 30)]
CASES = {
    **{
        f"paligemma{number}": Case(
            config=paligemma(text),
            prompts=((12, []), (12, IMAGES[:1]), (14, IMAGES)),
            unlike=unlike and paligemma(text | unlike),
            reference_inputs=paligemma_inputs,
            hub_names=HUB_NAMES,
        )
        for number, text, unlike in (("", GEMMA, None), ("2", GEMMA2, {"attn_logit_softcapping": None}))
    },
    "gemma3_text": Case(config=GEMMA3, prompts=((24, []),), unlike=GEMMA3 | {"sliding_window": 64}),
    "gemma3": gemma3_case(gemma3(), ((12, []), (12, IMAGES[:1]), (14, IMAGES)), gemma3(sliding_window=64)),
    # Spans longer than the window.
    "gemma3_short_window": gemma3_case(
        gemma3(sliding_window=3), ((12, IMAGES[:1]), (14, IMAGES)), gemma3(sliding_window=64)
    ),
    "gemma3_crops": gemma3_case(
        gemma3(),
        ((12, []), (12, [(30, 84)]), (14, IMAGES)),
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=14,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    ),
}
