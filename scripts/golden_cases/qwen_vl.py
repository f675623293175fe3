"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos at their own size, positions on three axes."""

import json
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_together

from golden_cases import Case, load_image_processor
from golden_cases.text import TEXT

VIDEO_TOKEN, VISION_START, VISION_END = (checkpoints.IMAGE_TOKEN - i for i in (1, 2, 3))
SPECIAL_TOKENS = {"<|video_pad|>": VIDEO_TOKEN, "<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END}
MERGE_SIZE = LAYER = 2
"""Patches along a side of a square, and frames of a layer."""
USUAL_FPS = 24
"""Of frames that are given without their times."""


def qwen_vl(name: str, architecture: str, *, vision: dict, section: list[int], **text) -> dict:
    patches = {"depth": 3, "num_heads": 2, "in_channels": 3, "spatial_merge_size": MERGE_SIZE}
    rope = TEXT["rope_parameters"] | {"mrope_section": section} | text.pop("rope", {})
    return {
        "model_type": name,
        "architectures": [architecture],
        "vision_config": {"model_type": f"{name}_vision", **patches, "temporal_patch_size": LAYER, **vision},
        "text_config": {
            "model_type": f"{name}_text",
            **TEXT,
            "max_position_embeddings": 512,
            "rope_parameters": rope,
            **text,
        },
        "image_token_id": checkpoints.IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def qwen2_vl(section: list[int]) -> dict:
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "hidden_act": "quick_gelu", "patch_size": 7}
    return qwen_vl("qwen2_vl", "Qwen2VLForConditionalGeneration", vision=vision, section=section)


def qwen2_5_vl(full_layers: list[int]) -> dict:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "hidden_act": "silu",
        "patch_size": 7,
        "window_size": 28,  # two squares
        "fullatt_block_indexes": full_layers,
        "tokens_per_second": 25,  # so that layers are two positions apart, and now and then three
    }
    return qwen_vl("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", vision=vision, section=[2, 3, 3])


def qwen3_vl(deep_layers: list[int]) -> dict:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 8,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": deep_layers,
    }
    text = {"num_hidden_layers": 3, "head_dim": 24, "attention_bias": False, "rope": {"mrope_interleaved": True}}
    return qwen_vl("qwen3_vl", "Qwen3VLForConditionalGeneration", vision=vision, section=[5, 4, 3], **text)


def processor_files(config: dict) -> dict[str, dict]:
    """Images of 4 to 36 squares; frames of 2 to 12, of which those of Qwen3-VL's are for all frames of a video."""
    patch_size = config["vision_config"]["patch_size"]
    square = (MERGE_SIZE * patch_size) ** 2
    third = config["model_type"] == "qwen3_vl"
    common = {
        "patch_size": patch_size,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": LAYER,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5] if third else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5, 0.5, 0.5] if third else [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    of_frames = {"shortest_edge": 8 * square, "longest_edge": 40 * square} if third else {}
    of_frames = of_frames or {"shortest_edge": 2 * square, "longest_edge": 12 * square}
    return {
        "preprocessor_config.json": {
            **common,
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 4 * square, "longest_edge": 36 * square},
        },
        "video_preprocessor_config.json": {
            **common,
            "video_processor_type": f"Qwen{3 if third else 2}VLVideoProcessor",
            "size": of_frames,
        },
    }


def video_features(directory: Path, videos: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """What Hugging Face's video processor gives, which needs torchvision, but for PIL's way to resize frames."""
    options = json.loads((directory / "video_preprocessor_config.json").read_text())
    processor = load_image_processor(directory)
    limits = {"min_pixels": options["size"]["shortest_edge"], "max_pixels": options["size"]["longest_edge"]}
    side = options["patch_size"] * MERGE_SIZE
    patches, grids = [], []
    for video in videos:
        num_frames, height, width, _ = video.shape
        if options["video_processor_type"].startswith("Qwen3"):
            height, width = smart_resize_together(
                num_frames, height, width, temporal_factor=LAYER, factor=side, **limits
            )
        else:
            height, width = smart_resize(height, width, factor=side, **limits)
        frames = [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in video
        ]
        scaled = [processor.rescale(frame.transpose(2, 0, 1), options["rescale_factor"]) for frame in frames]
        normed = [processor.normalize(frame, options["image_mean"], options["image_std"]) for frame in scaled]
        stacked = torch.tensor(np.stack(normed)[None], dtype=torch.float32)
        sizes = {"patch_size": options["patch_size"], "merge_size": MERGE_SIZE, "temporal_patch_size": LAYER}
        flat, *grid = Qwen3VLVideoProcessor.patchify(None, stacked, **sizes)
        patches.append(flat[0])
        grids.append(grid)
    return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}


def reference_inputs(
    directory: Path, prompt: list[int], pictures: list[np.ndarray], videos: list[np.ndarray]
) -> tuple[list[int], dict]:
    """As `Case.reference_inputs`; what stands for an item is made by functions of Hugging Face's processors."""
    if not pictures and not videos:
        return prompt, {}
    config = json.loads((directory / "config.json").read_text())
    processor = load_image_processor(directory)
    features = dict(processor(images=list(map(Image.fromarray, pictures)), return_tensors="pt")) if pictures else {}
    features |= video_features(directory, videos) if videos else {}
    sizes = SimpleNamespace(merge_size=MERGE_SIZE, temporal_patch_size=LAYER)
    stand_in = SimpleNamespace(
        image_token="<image>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_processor=sizes,
        video_processor=sizes,
    )
    stand_in._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(stand_in, *args)
    metadata = [SimpleNamespace(fps=None, frames_indices=list(range(len(video)))) for video in videos]
    family = Qwen3VLProcessor if config["model_type"] == "qwen3_vl" else Qwen2VLProcessor
    images = (family.replace_image_token(stand_in, features, i) for i in range(len(pictures)))
    clips = (
        family.replace_video_token(stand_in, features | {"video_metadata": metadata}, i) for i in range(len(videos))
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    words = {checkpoints.IMAGE_TOKEN: images, VIDEO_TOKEN: clips}
    text = [next(words[token]) if token in words else tokenizer.convert_ids_to_tokens(token) for token in prompt]
    ids = tokenizer(" ".join(text), add_special_tokens=False)["input_ids"]
    if videos and config["model_type"] == "qwen2_5_vl":
        features["second_per_grid_ts"] = torch.tensor([LAYER / USUAL_FPS] * len(videos))
    kinds = {checkpoints.IMAGE_TOKEN: 1, VIDEO_TOKEN: 2}
    features["mm_token_type_ids"] = torch.tensor([[kinds.get(token, 0) for token in ids]], dtype=torch.int)
    return ids, features


def case(config: dict, *, unlike: dict, hub_names=()) -> Case:
    around = ([VISION_START], [VISION_END])
    return Case(
        config=config,
        prompts=(
            (12, []),
            (12, [(40, 100)]),
            # Too large; as small as allowed; too small. Last, a video of an odd number of frames, longer than wide.
            (14, [(120, 96), (30, 32), (20, 60)]),
            (10, [(50, 60)], [(9, 40, 30)]),
        ),
        unlike=unlike,
        reference_inputs=reference_inputs,
        files=processor_files(config),
        special_tokens=SPECIAL_TOKENS,
        around={"image": around, "video": around},
        hub_names=hub_names,
    )


_HUB_NAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))

CASES = {
    "qwen2_vl": case(qwen2_vl([2, 3, 3]), unlike=qwen2_vl([4, 2, 2]), hub_names=_HUB_NAMES),
    "qwen2_5_vl": case(qwen2_5_vl([1]), unlike=qwen2_5_vl([0, 1]), hub_names=_HUB_NAMES),
    "qwen3_vl": case(qwen3_vl([0, 1]), unlike=qwen3_vl([1, 2])),
}
