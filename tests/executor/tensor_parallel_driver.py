"""Answers of tiny models on virtual CPU devices, and what each program's devices tell each other, as one JSON object.

python tensor_parallel_driver.py NAME:DEVICES:ENCODER_PARALLEL ...

DEVICES is how many a model is divided over, or 2x4, say, for two copies, each on four. NAME is one of
`aphrodite_jax.testing.tiny_models`, or the golden of a text model. All have eight heads, and two of keys and values.
"""

import collections
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import haste

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {haste.FLAGS}"

import jax
import numpy as np
import transformers
from flax import nnx
from golden_files import read_golden
from PIL import Image

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.modeling.loader import save_pretrained
from aphrodite_jax.multimodal.context import class_of_config
from aphrodite_jax.testing import tiny_models
from aphrodite_jax.testing.tokenizers import byte_tokenizer
from aphrodite_jax.testing.weights import random_weights

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
ANSWER_TOKENS = 20
CAPTURED = "llava"
"""The model that is looked into as well, which calls attention without a cache."""
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def write_model(name: str, directory: Path) -> dict[str, int]:
    """A checkpoint of random weights; modality to the token that stands for an item in a prompt."""
    placeholders: dict[str, int] = {}
    if name in tiny_models():
        tiny = tiny_models()[name]
        config, files, tokenizer = tiny.config, tiny.files, tiny.tokenizer
        for modality in ("image", "video"):
            fields = (getattr(config, f"{modality}_token_{ending}", None) for ending in ("id", "index"))
            found = [token for token in (tiny.placeholders.get(modality), *fields) if token is not None]
            if found:
                placeholders[modality] = found[0]
    else:
        config, files, tokenizer = transformers.AutoConfig.for_model(**read_golden(name).config), {}, byte_tokenizer()
    for field, value in HEADS.items():
        setattr(config.get_text_config(), field, value)
    save_pretrained(nnx.merge(*random_weights(class_of_config(config), config)), config, directory)
    tokenizer.save_pretrained(directory)
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content))
    return placeholders


def prompt_for(placeholders: dict[str, int]) -> dict:
    """Text, with two images of one size and a video behind it where the model takes them."""
    rng = np.random.default_rng(0)
    token_ids, media = rng.integers(3, 60, 12).tolist(), {}
    if "image" in placeholders:
        token_ids += [placeholders["image"], 9, placeholders["image"], 4]
        media["image"] = [Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)) for _ in range(2)]
    if "video" in placeholders:
        token_ids += [placeholders["video"], 8]
        media["video"] = [rng.integers(0, 256, (4, 28, 28, 3), np.uint8)]
    return {"prompt_token_ids": token_ids, "multi_modal_data": media}


def open_model(directory: Path, prompt: dict, devices: str, encoder_parallel: str) -> LLM:
    copies, _, each = devices.rpartition("x")
    return LLM(
        directory,
        dtype="float32",
        limit_mm_per_prompt={modality: len(items) for modality, items in prompt["multi_modal_data"].items()},
        tensor_parallel_size=int(each),
        data_parallel_size=int(copies or 1),
        encoder_parallel=encoder_parallel,
        max_num_seqs=1,
        compilation_cache_dir=None,
        warm_up=False,
        show_progress=False,
    )


def answer(llm: LLM, prompt: dict) -> list[int]:
    """To the prompt, by each copy of the model; those of the others follow where they differ from the first's."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    copies = llm.engine.replicas
    outputs = llm.generate([prompt] * len(copies), params, on_error="raise", use_tqdm=False)
    assert all(copy.runner.programs.table() for copy in copies)
    answers = {output.outputs[0].token_ids for output in outputs}
    return [token for answer in answers for token in answer]


def hidden_states(llm: LLM, prompt: dict) -> np.ndarray:
    return llm.capture(prompt, hidden_states=[-1]).hidden_states[-1]


def programs_of(llm: LLM) -> list[dict]:
    """Each program's name and bucket, and its collectives by kind: the shape of each array that they give."""
    told = []
    for program in [x for copy in llm.engine.replicas for x in copy.runner.programs.table()]:
        found = collections.defaultdict(list)
        for arrays, kind in COLLECTIVE.findall(program.call.as_text()):
            found[kind] += [list(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", arrays)]
        told.append({"name": program.name, "key": program.key, "collectives": found})
    return told


def run(name: str, cases: list[tuple[str, str]]) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        prompt = prompt_for(write_model(name, Path(directory)))
        alone = open_model(Path(directory), prompt, "1", "items")
        expected, result = answer(alone, prompt), {}
        for devices, encoder_parallel in cases:
            llm = open_model(Path(directory), prompt, devices, encoder_parallel)
            runner = llm.engine.runner
            told = result[f"{name}:{devices}:{encoder_parallel}"] = {
                "expected": expected,
                "found": answer(llm, prompt),
                "layers": runner.num_layers,
                "vocab_size": runner.vocab_size,
                "width": runner._arrays.encoder_cache.shape[1],
                "share": runner.memory_budget().weights / alone.engine.runner.memory_budget().weights,
                "programs": programs_of(llm),
            }
            if name == CAPTURED:
                apart = np.abs(hidden_states(llm, prompt) - hidden_states(alone, prompt))
                told["apart"] = float(apart.max())
    return result


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    results, by_name = {}, collections.defaultdict(list)
    for case in sys.argv[1:]:
        name, devices, encoder_parallel = case.split(":")
        by_name[name].append((devices, encoder_parallel))
    for name, cases in by_name.items():
        results |= run(name, cases)
    print(json.dumps(results))
