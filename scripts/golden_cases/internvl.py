"""InternVL: images in tiles between two tokens, and videos whose frames are named."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import numpy as np
import torch
import transformers
from PIL import Image

from golden_cases import Case, load_image_processor
from golden_cases.text import LLAMA, QWEN2, QWEN3

_NAMES = ["<img>", "</img>", "<video>", "\n", "Frame1:", "Frame2:", "Frame3:"]
SPECIAL_TOKENS = {name: checkpoints.IMAGE_TOKEN - len(_NAMES) + index for index, name in enumerate(_NAMES)}
HUB_NAMES = (
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
TILE = 28


def internvl(text: dict, *, tower: dict, **fields) -> dict:
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": [TILE, TILE],
            "patch_size": [7, 7],
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            **tower,
        },
        "text_config": text | {"max_position_embeddings": 512, "tie_word_embeddings": False},
        "image_token_id": checkpoints.IMAGE_TOKEN,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **fields,
    }


def files(**options) -> dict:
    """The image processor's file says that images are not cut, as those of the hub do; the processor cuts them."""
    return {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": TILE, "width": TILE},
            "crop_to_patches": False,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            **options,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "InternVLVideoProcessor",
            "size": {"height": TILE, "width": TILE},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.3, 0.2, 0.1],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_special_tokens": {
                "context_image_token": "<image>",
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "video_token": "<video>",
            },
        },
    }


def reference_inputs(
    directory: Path, prompt: list[int], pictures: list[np.ndarray], videos: list[np.ndarray]
) -> tuple[list[int], dict]:
    """As `Case.reference_inputs`.

    The whole processor needs torchvision for its videos; the methods that it makes its text with do not.
    """
    if not pictures and not videos:
        return prompt, {}
    config = json.loads((directory / "config.json").read_text())
    tokenizer, image_processor = transformers.AutoTokenizer.from_pretrained(directory), load_image_processor(directory)
    side = config["vision_config"]["image_size"][0] // config["vision_config"]["patch_size"][0]
    processor = SimpleNamespace(
        start_image_token=tokenizer.start_image_token,
        end_image_token=tokenizer.end_image_token,
        image_token=tokenizer.context_image_token,
        image_seq_length=int((side * config["downsample_ratio"]) ** 2),
    )
    video_options = json.loads((directory / "video_preprocessor_config.json").read_text())
    video_options = {name: video_options[name] for name in ("image_mean", "image_std")}
    left = {"<image>": iter(pictures), "<video>": iter(videos)}
    pixels = []

    def replaced(match: re.Match) -> str:
        item = next(left[match[0]])
        if match[0] == "<image>":
            inputs = image_processor(images=[Image.fromarray(item)], crop_to_patches=True, return_tensors="pt")
            pixels.append(inputs["pixel_values"])
            return transformers.InternVLProcessor.replace_image_token(processor, inputs, 0)
        frames = list(map(Image.fromarray, item))
        inputs = image_processor(images=frames, crop_to_patches=False, return_tensors="pt", **video_options)
        pixels.append(inputs["pixel_values"])
        inputs = {"pixel_values_videos": inputs["pixel_values"][None]}
        return transformers.InternVLProcessor.replace_video_token(processor, inputs, 0)

    text = re.sub("<image>|<video>", replaced, " ".join(tokenizer.convert_ids_to_tokens(prompt)))
    return tokenizer(text, add_special_tokens=False)["input_ids"], {"pixel_values": torch.cat(pixels)}


def case(config: dict, *, unlike: dict, **processor) -> Case:
    return Case(
        config=config,
        prompts=((12, []), (12, [(40, 100)]), (12, [], [(3, 40, 60)]), (14, [(56, 28), (60, 62), (20, 60)])),
        unlike=unlike,
        reference_inputs=reference_inputs,
        files=files(**processor),
        special_tokens=SPECIAL_TOKENS,
        placeholders={"video": SPECIAL_TOKENS["<video>"]},
        hub_names=HUB_NAMES,
    )


_SMALL_TOWER = {"attention_bias": True}
_LARGE_TOWER = {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}
_OTHER_TOWER = {"use_absolute_position_embeddings": False, "use_mask_token": True}

CASES = {
    "internvl": case(
        internvl(QWEN2, tower=_SMALL_TOWER),
        unlike=internvl(QWEN2, tower=_SMALL_TOWER | {"num_attention_heads": 4}),
        max_patches=5,
    ),
    "internvl_large": case(
        internvl(QWEN3, tower=_LARGE_TOWER, downsample_ratio=0.25),
        unlike=internvl(QWEN3, tower=_LARGE_TOWER, downsample_ratio=0.25, vision_feature_layer=3),
    ),
    "internvl_layer": case(
        internvl(LLAMA, tower=_OTHER_TOWER, vision_feature_layer=-2),
        unlike=internvl(LLAMA, tower=_OTHER_TOWER, vision_feature_layer=1),
        max_patches=4,
        min_patches=2,
    ),
}
