"""Idefics3 and SmolVLM: images in tiles, with names of tiles between their rows."""

import json
from pathlib import Path

import checkpoints
import numpy as np
import transformers
from PIL import Image
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from golden_cases import Case, load_image_processor
from golden_cases.text import LLAMA, MISTRAL

AROUND = ("<global-img>", "<fake_token_around_image>")
NAMES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))


def special_tokens(*texts: str) -> dict[str, int]:
    """Ids of these at the end of the vocabulary, before that of an image."""
    return {text: checkpoints.IMAGE_TOKEN - len(texts) + index for index, text in enumerate(texts)}


def idefics3(text: dict, *, tower: dict, name: str = "idefics3", **fields) -> dict:
    architecture = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name]
    return {
        "model_type": name,
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "vision_config": {
            "model_type": f"{name}_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            **tower,
        },
        "text_config": text | {"max_position_embeddings": 512},
        "image_token_id": checkpoints.IMAGE_TOKEN,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **fields,
    }


def processor_file(kind: str, *, tile: int, longest_edge: int, do_image_splitting: bool = True) -> dict:
    return {
        "preprocessor_config.json": {
            "image_processor_type": kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"longest_edge": longest_edge},
            "resample": 1,
            "do_image_splitting": do_image_splitting,
            "max_image_size": {"longest_edge": tile},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_pad": True,
        }
    }


def expanded_prompt(directory: Path, prompt: list[int], images: list[Image.Image], rows_per_tile: int) -> list[int]:
    """The prompt in which Hugging Face's processor of the family has put what stands for each image.

    That of SmolVLM needs torchvision; the function that it makes its text with does not.
    """
    image_processor = load_image_processor(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = " ".join(tokenizer.convert_ids_to_tokens(prompt))
    if json.loads((directory / "config.json").read_text())["model_type"] == "idefics3":
        processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=rows_per_tile)
        return processor(text=[text], images=[images], add_special_tokens=False)["input_ids"][0]
    features = image_processor(images=[images], return_row_col_info=True)
    for rows, columns in zip(features["rows"][0], features["cols"][0], strict=True):
        names = ("<fake_token_around_image>", "<IMAGE>", "<global-img>")
        text = text.replace("<image>", get_image_prompt_string(rows, columns, rows_per_tile, *names), 1)
    return tokenizer(text.replace("<IMAGE>", "<image>"), add_special_tokens=False)["input_ids"]


def reference_inputs(directory: Path, prompt: list[int], pictures: list[np.ndarray], videos) -> tuple[list[int], dict]:
    """As `Case.reference_inputs`."""
    if not pictures:
        return prompt, {}
    config = json.loads((directory / "config.json").read_text())
    image_processor = load_image_processor(directory)
    images = list(map(Image.fromarray, pictures))
    side = image_processor.max_image_size["longest_edge"] // config["vision_config"]["patch_size"]
    expanded = expanded_prompt(directory, prompt, images, side**2 // config["scale_factor"] ** 2)
    return expanded, dict(image_processor(images=[images], return_tensors="pt"))


def case(config: dict, *, unlike: dict, special: tuple[str, ...], third=(20, 60), **processor) -> Case:
    kind = {"idefics3": "Idefics3ImageProcessor", "smolvlm": "SmolVLMImageProcessor"}[config["model_type"]]
    return Case(
        config=config,
        prompts=((12, []), (12, [(40, 100)]), (14, [(120, 52), (30, 32), third])),
        unlike=unlike,
        reference_inputs=reference_inputs,
        files=processor_file(kind, **processor),
        special_tokens=special_tokens(*special),
    )


# Four rows a tile, of 2 x 2 patches each.
_IDEFICS3_TOWER = {"image_size": 28, "patch_size": 7}
_IDEFICS3 = idefics3(LLAMA, tower=_IDEFICS3_TOWER, scale_factor=2)
# A longest edge that is stretched to whole tiles; tiles with pixels that fill no patch, smaller than what the positions
# were learned on; rows of 3 x 3 patches.
_SMOLVLM_TOWER = {"image_size": 65, "patch_size": 7}
_SMOLVLM = idefics3(LLAMA, tower=_SMOLVLM_TOWER, name="smolvlm", scale_factor=3)
# Images that are not cut, and the language model's other forms.
_WHOLE = idefics3(MISTRAL, tower=_IDEFICS3_TOWER, scale_factor=2, tie_word_embeddings=True)

CASES = {
    "idefics3": case(
        _IDEFICS3,
        unlike=idefics3(LLAMA, tower=_IDEFICS3_TOWER | {"num_attention_heads": 4}, scale_factor=2),
        special=(*NAMES, *AROUND, "\n", "\n\n"),  # two line ends are one token, as in the real tokenizers
        tile=28,
        longest_edge=56,
    ),
    "smolvlm": case(
        _SMOLVLM,
        unlike=idefics3(LLAMA, tower=_SMOLVLM_TOWER | {"hidden_act": "relu"}, name="smolvlm", scale_factor=3),
        special=(*NAMES, *AROUND, "\n"),
        tile=45,
        longest_edge=64,
    ),
    "idefics3_whole": case(
        _WHOLE,
        unlike=_WHOLE | {"text_config": _WHOLE["text_config"] | {"sliding_window": None}},
        special=AROUND,
        third=(24, 60),
        tile=28,
        longest_edge=84,
        do_image_splitting=False,
    ),
}
