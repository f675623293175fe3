"""Make or check the golden files of the parity tests with Hugging Face's own models. Needs torch.

    python scripts/make_goldens.py            # write tests/goldens/*.npz
    python scripts/make_goldens.py --check    # compute them again and compare

Each file holds a config, the seed of its weights (`tests/checkpoints.py` makes them from it), and prompts
with their images, float32 prefill logits and 32 greedy tokens. Seeds are searched until every greedy choice
is clear, so that equal tokens are a fair demand of other implementations.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.modeling_outputs import CausalLMOutputWithPast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402
from golden_files import GOLDENS, read_golden  # noqa: E402

transformers.utils.logging.disable_progress_bar()

NUM_GREEDY = 32
CLEAR_MARGIN = 0.01
"""Least distance of the best logit from the second best, at each greedy step."""
SAME = 1e-4
"""Largest difference of logits between a stored file and a new computation."""

TEXT = {
    "vocab_size": checkpoints.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT}
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    **TEXT,
    "head_dim": 24,  # not hidden_size / num_attention_heads
    "sliding_window": 8,  # shorter than the prompts
}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    **TEXT,
    "use_sliding_window": False,
}
GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    **TEXT,
    "head_dim": 24,
    "hidden_act": "gelu",  # old files mean the tanh form
    "tie_word_embeddings": True,
}
GEMMA2 = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    **{name: value for name, value in TEXT.items() if name != "hidden_act"},
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "tie_word_embeddings": False,
}
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


def rope(kind: str, **parameters) -> dict:
    return LLAMA | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


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


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "original_max_position_embeddings": 48,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
QWEN2_WINDOWS = QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

# Name to config and prompts: (tokens of text, images, or their sizes) each. Where lengths cross the trained one of a
# rope scaling, one prompt stands on each side and one crosses it while it is continued.
CASES: dict[str, tuple[dict, list[tuple[int, int | list[tuple[int, int]]]]]] = {
    "llama": (LLAMA, [(24, 0)]),
    "llama_biases_mha": (
        LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        [(24, 0)],
    ),
    "llama_tied_mqa": (LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}, [(24, 0)]),
    "llama_rope_theta": (rope("default", rope_theta=500000.0), [(24, 0)]),
    "llama_linear": (rope("linear", factor=4.0), [(24, 0)]),
    "llama_dynamic": (
        rope("dynamic", factor=2.0) | {"max_position_embeddings": 48},
        [(12, 0), (30, 0), (60, 0)],
    ),
    "llama_yarn": (rope("yarn", **YARN), [(24, 0)]),
    "llama_yarn_mscale": (
        rope("yarn", **YARN, mscale=0.8, mscale_all_dim=0.4, beta_fast=8, beta_slow=2),
        [(24, 0)],
    ),
    "llama_yarn_no_truncate": (
        rope("yarn", **YARN, truncate=False, attention_factor=1.3, beta_fast=4),
        [(24, 0)],
    ),
    "llama_longrope": (rope("longrope", **LONGROPE), [(12, 0), (30, 0), (60, 0)]),
    "llama_longrope_factor": (
        rope("longrope", **LONGROPE, factor=3.0, attention_factor=1.2),
        [(12, 0), (60, 0)],
    ),
    "llama_llama3": (
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        [(24, 0)],
    ),
    "llama_proportional": (rope("proportional", partial_rotary_factor=0.5, factor=2.0), [(24, 0)]),
    "mistral": (MISTRAL, [(24, 0)]),
    "mistral_no_window": (MISTRAL | {"sliding_window": None}, [(24, 0)]),
    "qwen2": (QWEN2, [(24, 0)]),
    "qwen2_tied": (QWEN2 | {"tie_word_embeddings": True}, [(24, 0)]),
    "qwen2_windows": (QWEN2_WINDOWS, [(24, 0)]),
    "gemma": (GEMMA, [(24, 0)]),
    "gemma2": (GEMMA2, [(24, 0)]),
    "gemma2_no_caps": (GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}, [(24, 0)]),
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


# Name to a config that must give other logits with the same weights: else the case would show nothing.
UNLIKE = {
    **{
        name: config | {"rope_parameters": TEXT["rope_parameters"]}
        for name, (config, _) in CASES.items()
        if config.get("rope_parameters", TEXT["rope_parameters"]) != TEXT["rope_parameters"]
    },
    "mistral": MISTRAL | {"sliding_window": None},
    "qwen2_windows": QWEN2,
    "gemma2": GEMMA2 | {"attn_logit_softcapping": None},
    "gemma2_no_caps": GEMMA2 | {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2},
    "llava_clip_mistral": llava(CLIP, MISTRAL | {"sliding_window": None}),
    "llava_siglip_mistral": llava(SIGLIP, MISTRAL | {"sliding_window": None}),
    "llava_projector": llava(CLIP, LLAMA, multimodal_projector_bias=False, projector_hidden_act="quick_gelu"),
}
UNLIKE_BY = 0.01


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


def load_image_processor(directory: Path):
    return transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")


def make_prompt(directory: Path, num_text: int, images: int | list[tuple[int, int]], seed: int) -> dict:
    """What the model is given, by the names of `GoldenPrompt`; the last two of three images touch.

    Images are of the tower's size, or of sizes (height, width) that are given.
    """
    if isinstance(images, int):
        images = [(checkpoints.IMAGE_SIZE,) * 2] * images
    noise = checkpoints.uniform(f"text {num_text} {len(images)}", (num_text,), seed)
    text = [1, *(3 + ((noise[1:] + 1) / 2 * (checkpoints.IMAGE_TOKEN - 3)).astype(int)).tolist()]
    pictures = checkpoints.images_of(images, seed) if images else []
    prompt = list(text)
    for position in (3, 6, 7)[: len(images)]:
        prompt.insert(position, checkpoints.IMAGE_TOKEN)
    rows = iter(rows_per_image(directory, pictures) if images else ())
    expanded = [token for token in prompt for _ in range(next(rows) if token == checkpoints.IMAGE_TOKEN else 1)]
    return {
        "prompt": np.array(prompt, np.int32),
        "input_ids": np.array(expanded, np.int32),
        "images": pictures,
    }


def load_reference(directory: Path) -> torch.nn.Module:
    """The model as transformers loads it; every tensor of the file must be used, and none be missing."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_cls = getattr(transformers, config.architectures[0])
    model, info = model_cls.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise SystemExit(f"transformers does not load {directory.name} cleanly: {problems}")
    return model.eval()


CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls keys and values of the tokens before; "cache" from 5.24 on."""


@torch.no_grad()
def run_reference(directory: Path, prompt: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Prefill logits ``[T, V]``, greedy tokens, and the least margin of a greedy choice.

    The model is loaded anew for each prompt: some rope scalings keep state from one call to the next.
    """
    model = load_reference(directory)
    inputs = {"input_ids": torch.tensor(prompt["input_ids"], dtype=torch.long)[None]}
    if len(prompt["images"]) and model.config.model_type == "llava":
        inputs["pixel_values"] = torch.tensor(checkpoints.pixel_values(prompt["images"]))
    elif len(prompt["images"]):
        pictures = list(map(Image.fromarray, prompt["images"]))
        inputs |= load_image_processor(directory)(images=pictures, return_tensors="pt")
    out = model(**inputs, use_cache=True)
    logits = out.logits[0].numpy()
    tokens, margin = [], np.inf
    for _ in range(NUM_GREEDY):
        last = out.logits[0, -1]
        best = torch.topk(last, 2).values
        margin = min(margin, float(best[0] - best[1]))
        tokens.append(int(last.argmax()))
        out = model(input_ids=torch.tensor([[tokens[-1]]]), use_cache=True, **{CACHE: out[CACHE]})
    return logits, np.array(tokens, np.int32), margin


def make_golden(name: str) -> dict[str, np.ndarray]:
    """The content of one file, by the first seed whose greedy choices are clear and not all the same.

    Nor is a token of an answer that of an image: in one call with the prompt it would stand for a row of one.
    """
    config, prompts = CASES[name]
    for seed in range(100):
        golden = {"config": np.array(json.dumps(config)), "seed": np.array(seed)}
        margins, distinct = [], []
        with tempfile.TemporaryDirectory(prefix=name) as folder:
            directory = checkpoints.write_checkpoint(Path(folder), config, seed)
            for index, (num_text, images) in enumerate(prompts):
                prompt = make_prompt(directory, num_text, images, seed)
                logits, tokens, margin = run_reference(directory, prompt)
                if index == len(prompts) - 1 and name in UNLIKE:
                    require_other_logits(directory, UNLIKE[name], prompt, logits)
                golden |= {f"{index}.{key}": value for key, value in stored_form(prompt).items()}
                golden |= {f"{index}.logits": logits, f"{index}.tokens": tokens}
                margins.append(-1 if len(prompt["images"]) and checkpoints.IMAGE_TOKEN in tokens else margin)
                distinct.append(len(set(tokens.tolist())))
        if min(margins) >= CLEAR_MARGIN and min(distinct) >= 5:
            print(f"{name}: seed {seed}, least margin {min(margins):.3f}, distinct tokens {distinct}")
            return golden
    raise SystemExit(f"{name}: no seed gives clear greedy choices")


def stored_form(prompt: dict) -> dict[str, np.ndarray]:
    """Images of one size as one array; of different sizes, an array each (`golden_files.read_golden`)."""
    images = prompt["images"]
    if len({image.shape for image in images}) <= 1:
        empty = np.zeros((0, checkpoints.IMAGE_SIZE, checkpoints.IMAGE_SIZE, 3), np.uint8)
        return prompt | {"images": np.stack(images) if images else empty}
    apart = {f"image{index}": image for index, image in enumerate(images)}
    return {name: value for name, value in prompt.items() if name != "images"} | apart


def require_other_logits(directory: Path, config: dict, prompt: dict[str, np.ndarray], logits) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    distance = np.abs(run_reference(directory, prompt)[0] - logits).max()
    if distance < UNLIKE_BY:
        raise SystemExit(f"{directory.name}: what the case is about moves logits by {distance:.1e} only")


def check_golden(name: str) -> float:
    """Largest difference of logits between the stored file and a new computation.

    Raises:
      AssertionError: another config or other prompts are stored, or the greedy tokens differ.
    """
    golden = read_golden(name)
    config, prompts = CASES[name]
    assert golden.config == json.loads(json.dumps(config)), f"{name}: another config is stored; make it again"
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix=name) as folder:
        directory = golden.write_checkpoint(Path(folder))
        for (num_text, images), prompt in zip(prompts, golden.prompts, strict=True):
            given = make_prompt(directory, num_text, images, golden.seed)
            for field in ("prompt", "input_ids"):
                np.testing.assert_array_equal(getattr(prompt, field), given[field], err_msg=f"{name}: {field}")
            for stored, image in zip(prompt.images, given["images"], strict=True):
                np.testing.assert_array_equal(stored, image, err_msg=f"{name}: images")
            logits, tokens, _ = run_reference(directory, given)
            np.testing.assert_array_equal(tokens, prompt.tokens, err_msg=f"{name}: greedy tokens")
            worst = max(worst, float(np.abs(logits - prompt.logits).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; all of them by default")
    parser.add_argument("--check", action="store_true", help="compare with the stored files")
    args = parser.parse_args()
    GOLDENS.mkdir(exist_ok=True)
    for name in args.names or CASES:
        if args.check:
            worst = check_golden(name)
            print(f"{name}: logits differ by {worst:.1e}")
            if worst > SAME:
                raise SystemExit(f"{name}: that is more than {SAME:.0e}")
        else:
            np.savez_compressed(GOLDENS / f"{name}.npz", **make_golden(name))
    stray = sorted(file.name for file in GOLDENS.glob("*.npz") if file.stem not in CASES)
    if stray:
        raise SystemExit(f"{GOLDENS} holds files of no case: {', '.join(stray)}")
    print(f"{sum(file.stat().st_size for file in GOLDENS.glob('*.npz')) / 1e6:.2f} MB in {GOLDENS}")


if __name__ == "__main__":
    main()
