"""Model directories without weights: the config, processor and tokenizer files that inputs are made from."""

import json
from pathlib import Path

import tokenizers
import transformers

SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
IMAGE_TOKEN = SPECIALS.index("<image>")
WIDTH = 16

TOWERS = {
    "clip": {"model_type": "clip_vision_model", "hidden_size": 12, "num_attention_heads": 2},
    "siglip": {"model_type": "siglip_vision_model", "hidden_size": 12, "num_attention_heads": 2},
}
CLIP_PROCESSOR = {  # of llava-hf/llava-1.5-7b-hf
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}


def text_config(**fields) -> dict:
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return llama | fields


def llava_config(tower: str = "clip", *, image_size: int = 28, patch_size: int = 14, **fields) -> dict:
    """A LLaVA of four patches; ``fields`` of the outer config."""
    llava = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": TOWERS[tower] | {"image_size": image_size, "patch_size": patch_size},
        "text_config": text_config(architectures=None),
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    return llava | fields


def write_config(directory: Path, config: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_llava(directory: Path, config: dict | None = None, processor: dict | None = None) -> Path:
    """``config.json`` and ``preprocessor_config.json`` alone."""
    write_config(directory, llava_config() if config is None else config)
    (directory / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR if processor is None else processor))
    return directory


def write_tokenizer(directory: Path, chat_template: str | None = None, *, added: tuple[str, ...] = ()) -> Path:
    """A token for each byte, `SPECIALS`, and ``added`` ones that are not special; ``<s>`` goes before a prompt."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory
