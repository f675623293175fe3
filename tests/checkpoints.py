"""Tiny checkpoints in Hugging Face's format, the same on every machine, made without torch.

Weights are a function of seed, name and shape alone (SplitMix64, exact in integers), so that golden files
need not hold them. Names and shapes are written out here from the formats of the hub's files, not taken from
our models, so that both can be wrong only apart.
"""

import json
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers
import transformers

IMAGE_TOKEN = 159
VOCAB_SIZE = 160
IMAGE_SIZE = 28
LAYOUTS = ("hub", "new", "memory")
"""Key layouts: most hub files; newer files; what transformers 5 holds in memory and saves."""


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 numbers in [-1, 1): hashes of their index, keyed by ``name`` and ``seed``."""
    key = (zlib.crc32(name.encode()) << 32 | seed) * 0x9E3779B97F4A7C15 % 2**64
    z = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(40)
    return (z.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def images(count: int, seed: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """``[count, size, size, 3]`` uint8 noise in blocks of four pixels."""
    coarse = uniform("images", (count, size // 4, size // 4, 3), seed)
    fine = ((coarse + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    return fine.repeat(4, axis=1).repeat(4, axis=2)


def images_of(sizes, seed: int) -> list[np.ndarray]:
    """Noise in blocks of four pixels, ``[height, width, 3]`` uint8 for each (height, width)."""
    side = max(max(size) for size in sizes)
    side += -side % 4
    whole = images(len(sizes), seed, side)
    return [picture[:height, :width] for picture, (height, width) in zip(whole, sizes, strict=True)]


def video_of(size: tuple[int, int, int], seed: int) -> np.ndarray:
    """Noise in blocks of four pixels, ``[frames, height, width, 3]`` uint8."""
    frames, height, width = size
    return np.stack(images_of([(height, width)] * frames, seed + 1000))


def pixel_values(pictures) -> np.ndarray:
    """What the processor of `write_processor` makes of ``[n, h, w, 3]``: ``[n, 3, h, w]`` in [-1, 1]."""
    scaled = np.stack(pictures).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def weights(config: dict, seed: int, shapes: dict[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A float32 tensor for each name of ``shapes``."""
    gemma = "gemma" in config.get("text_config", config)["model_type"]
    return {name: _weight(name, tuple(shape), seed, gemma) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], seed: int, gemma: bool) -> np.ndarray:
    noise = uniform(name, shape, seed)
    if re.search(r"norm|\bln_", name) and name.endswith("weight") and len(shape) == 1:
        centre = 0 if gemma and "vision" not in name else 1  # a Gemma's weight is what the factor has over 1
        return np.float32(centre) + np.float32(0.4) * noise
    if len(shape) == 1:
        return np.float32(0.3) * noise
    if gemma and "embed_tokens" in name:  # which the model multiplies by the root of the width
        return np.float32(2 * shape[1] ** -0.5) * noise
    if re.search(r"embed_tokens|position_embedding|pos_embed|cls_token", name):
        return noise
    # Unit variance in, `gain` times it out: sharp attention and spread logits, so that a fault shows.
    gain = 3 if "lm_head" in name else 2 if "q_proj" in name or "k_proj" in name else 1.2
    fan_in = math.prod(shape[1:])
    return np.float32(gain * math.sqrt(3 / fan_in)) * noise


WITH_SHAPES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "llava", "llava_next")


def has_shapes(config: dict) -> bool:
    """Whether `hub_shapes` knows this kind of model. Goldens of others hold the names and shapes of the reference."""
    tower = config.get("vision_config", {}).get("model_type")
    return config["model_type"] in WITH_SHAPES and tower in (None, "clip_vision_model", "siglip_vision_model")


def hub_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name to shape of the tensors of a hub checkpoint; the output head is there unless it is tied."""
    if "vision_config" not in config:
        return text_shapes(config)
    text, vision = config["text_config"], config["vision_config"]
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    language = text_shapes(text | {"tie_word_embeddings": tied})
    tower = tower_shapes(vision)
    layer = config.get("vision_feature_layer", -2)
    rows = vision["hidden_size"] * (1 if isinstance(layer, int) else len(layer))
    projector = _linear("linear_1", text["hidden_size"], rows) | _linear(
        "linear_2", text["hidden_size"], text["hidden_size"]
    )
    if not config.get("multimodal_projector_bias", True):
        projector = {name: shape for name, shape in projector.items() if not name.endswith("bias")}
    return (
        {f"vision_tower.vision_model.{name}": shape for name, shape in tower.items()}
        | {f"multi_modal_projector.{name}": shape for name, shape in projector.items()}
        | {f"language_model.{name}": shape for name, shape in language.items()}
        | ({"image_newline": (text["hidden_size"],)} if config["model_type"] == "llava_next" else {})
    )


def text_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """A Llama, Mistral, Qwen2, Gemma or Gemma 2 language model."""
    kind, width, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or width // heads
    qkv_bias = kind == "qwen2" or (kind == "llama" and config.get("attention_bias", False))
    out_bias = kind == "llama" and config.get("attention_bias", False)
    mlp_bias = kind == "llama" and config.get("mlp_bias", False)
    found = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            **_linear("self_attn.q_proj", heads * head_dim, width, bias=qkv_bias),
            **_linear("self_attn.k_proj", kv_heads * head_dim, width, bias=qkv_bias),
            **_linear("self_attn.v_proj", kv_heads * head_dim, width, bias=qkv_bias),
            **_linear("self_attn.o_proj", width, heads * head_dim, bias=out_bias),
            **_linear("mlp.gate_proj", inner, width, bias=mlp_bias),
            **_linear("mlp.up_proj", inner, width, bias=mlp_bias),
            **_linear("mlp.down_proj", width, inner, bias=mlp_bias),
        }
        if kind == "gemma2":
            layer |= {f"{place}_feedforward_layernorm.weight": (width,) for place in ("pre", "post")}
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def tower_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """A CLIP or SigLIP vision tower, below ``vision_model``."""
    clip = config["model_type"] == "clip_vision_model"
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + clip
    found = {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        **_norm("post_layernorm", width),
    }
    if clip:
        found |= {"embeddings.class_embedding": (width,), **_norm("pre_layrnorm", width)}
    else:
        found |= {"embeddings.patch_embedding.bias": (width,), **_pooler_shapes(width, inner)}
    for index in range(config["num_hidden_layers"]):
        layer = _norm("layer_norm1", width) | _norm("layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer |= _linear(f"self_attn.{name}", width, width)
        layer |= _linear("mlp.fc1", inner, width) | _linear("mlp.fc2", width, inner)
        found |= {f"encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    return found


def _pooler_shapes(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """SigLIP's attention pooler, which LLaVA does not use and its files have."""
    return {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **_linear("head.attention.out_proj", width, width),
        **_norm("head.layernorm", width),
        **_linear("head.mlp.fc1", inner, width),
        **_linear("head.mlp.fc2", width, inner),
    }


def _linear(name: str, fan_out: int, fan_in: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in)} | ({f"{name}.bias": (fan_out,)} if bias else {})


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def relayout(tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """A LLaVA checkpoint's tensors from the names of the hub's files to another of `LAYOUTS`."""
    if layout == "hub":
        return tensors
    rules = [
        (r"^(vision_tower\.|multi_modal_projector\.|image_newline)", r"model.\1"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ]
    if layout == "memory":
        rules.append((r"^model\.vision_tower\.vision_model\.", "model.vision_tower."))
    return rename(tensors, rules)


def rename(tensors: dict[str, np.ndarray], rules: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    """The same tensors under names to which each rule, (pattern, replacement), was applied in turn."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def old_form(config: dict) -> dict:
    """A config as files before transformers 5 have it."""
    renamed = {"dtype": "torch_dtype", "image_token_id": "image_token_index"}
    old = {}
    for name, value in config.items():
        if name == "rope_parameters" and "full_attention" in value:  # one set for each kind of layer
            old["rope_theta"] = value["full_attention"]["rope_theta"]
            old["rope_local_base_freq"] = value["sliding_attention"]["rope_theta"]
            old["rope_scaling"] = {key: v for key, v in value["full_attention"].items() if key != "rope_theta"}
        elif name == "rope_parameters":
            old["rope_theta"] = value["rope_theta"]
            scaling = {key: v for key, v in value.items() if key != "rope_theta"}
            if scaling.get("rope_type") in ("linear", "dynamic", "yarn", "longrope"):
                scaling["type"] = scaling.pop("rope_type")  # the key before Llama 3's kind came
            old["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
        else:
            old[renamed.get(name, name)] = old_form(value) if isinstance(value, dict) else value
    return old


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """``model.safetensors``, or that many shards and their index."""
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::shards]}
        safetensors.numpy.save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(
    directory: Path,
    config: dict,
    seed: int,
    *,
    layout: str = "hub",
    shards: int = 1,
    dtype=np.float32,
    shapes: dict | None = None,
    files: dict | None = None,
    special_tokens: dict | None = None,
    hub_names: Sequence[tuple[str, str]] = (),
) -> Path:
    """A whole model directory: config, weights, tokenizer, and the image processor where it has a tower.

    Args:
      shapes: name to shape of each tensor as transformers holds them in memory; None writes out what `hub_shapes` has.
      files: JSON files by name, in the place of the usual processor's.
      special_tokens: text to id, beside ``<image>``.
      hub_names: (pattern, replacement) that make names of hub files of those of ``shapes``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if shapes is None:
        tensors = relayout(weights(config, seed, hub_shapes(config)), layout)
    else:
        renamed = weights(config, seed, shapes)
        tensors = rename(renamed, hub_names) if layout == "hub" else renamed
    write_tensors(directory, {name: tensor.astype(dtype) for name, tensor in tensors.items()}, shards=shards)
    text = config.get("text_config", config)
    write_tokenizer(directory, text["vocab_size"], special_tokens)
    for name, content in (files or {}).items():
        (directory / name).write_text(json.dumps(content, indent=2))
    if "vision_config" in config and not files:
        write_processor(directory, config["vision_config"], config.get("image_grid_pinpoints"))
    return directory


def write_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE, special_tokens: dict | None = None) -> None:
    """A word for each id: ``<unk>``, ``<s>``, ``</s>``, ``w3``, ``w4`` ... and ``<image>`` as the last."""
    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, vocab_size - 1)), "<image>"]
    for text, index in (special_tokens or {}).items():
        words[index] = text
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", *(special_tokens or {})],
    )
    fast.save_pretrained(directory)


def write_processor(directory: Path, vision: dict, pinpoints: list | None = None) -> None:
    """An image processor that resizes to the tower's size, or cuts into tiles of it, and scales to [-1, 1]."""
    clip = vision["model_type"] == "clip_vision_model"
    size = vision["image_size"]
    settings = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    if pinpoints is not None:
        settings |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_grid_pinpoints": pinpoints,
            "resample": 3,
            "do_pad": True,
        }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
