"""Measure the host memory that loading a checkpoint takes (Linux).

    python scripts/measure_loading_memory.py                  # checkpoints of about 600 MB
    python scripts/measure_loading_memory.py --megabytes 100

Two checkpoints of random weights, a Llama in bfloat16 and a LLaVA in float32, are written to a temporary
directory, and each is loaded to bfloat16 on the CPU by a fresh process. That process says how far the kernel's
own record of its largest resident set (``VmHWM``, pages of files included, cleared before the call) stood above
what was resident before `load_model`. Exits with 1 where that is more than the weights in bfloat16, the largest
tensor as it is stored, and `SLACK`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402

from aphrodite_jax.modeling.loader.safetensors_file import write_file  # noqa: E402

MB = 10**6
SLACK = 24 * MB
"""What the interpreter, tracing and code pages touched for the first time take, whatever the size of a model."""

TEXT = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "image_size": 336,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": LLAMA | {"hidden_size": 512, "intermediate_size": 1408},
    "image_token_index": 31999,
}
CASES = {"llama": (LLAMA, jnp.dtype(jnp.bfloat16)), "llava": (LLAVA, np.dtype(np.float32))}


def with_layers(config: dict, layers: int) -> dict:
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | {"num_hidden_layers": layers}}
    return config | {"num_hidden_layers": layers}


def sized(config: dict, dtype: np.dtype, megabytes: int) -> dict:
    """``config`` with as many decoder layers as make a checkpoint of about ``megabytes``."""

    def size(layers):
        return sum(map(math.prod, checkpoints.hub_shapes(with_layers(config, layers)).values())) * dtype.itemsize

    layers = round((megabytes * MB - size(0)) / (size(1) - size(0)))
    return with_layers(config, max(layers, 1))


def write_checkpoint(directory: Path, config: dict, dtype: np.dtype) -> dict[str, tuple[int, ...]]:
    """Random weights, written one at a time; returns their shapes."""
    shapes = checkpoints.hub_shapes(config)
    (directory / "config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(dtype)

    def tensor(name):
        return np.resize(noise, shapes[name])  # repeated: making new numbers takes longer than all the rest

    write_file(directory / "model.safetensors", {name: (dtype, shape) for name, shape in shapes.items()}, tensor)
    return shapes


def load_and_measure(directory: str) -> dict[str, int]:
    """Bytes by which loading raised this process's resident set, at its peak and in the end."""
    import jax

    from aphrodite_jax.architectures import resolve_architecture
    from aphrodite_jax.config import ModelConfig
    from aphrodite_jax.modeling.loader import load_model

    model_config = ModelConfig(model=directory, dtype="bfloat16")
    resolve_architecture(model_config.hf_config.architectures)  # imports the model's modules
    jax.block_until_ready(jnp.zeros(8) + 1)  # starts the backend
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = load_model(model_config)
    jax.block_until_ready(jax.tree.leaves(model))
    return {"peak": resident("VmHWM") - before, "end": resident("VmRSS") - before}


def resident(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(name: str, megabytes: int) -> dict[str, int]:
    """Bytes: the file, the weights in bfloat16, the largest stored tensor, and the rise at its peak and end."""
    config, dtype = CASES[name]
    config = sized(config, dtype, megabytes)
    with tempfile.TemporaryDirectory(prefix=name) as directory:
        sizes = [math.prod(shape) for shape in write_checkpoint(Path(directory), config, dtype).values()]
        child = subprocess.run(
            [sys.executable, __file__, "--load", directory],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    measured = json.loads(child.stdout)
    return {
        "file": sum(sizes) * dtype.itemsize,
        "weights": 2 * sum(sizes),
        "largest": max(sizes) * dtype.itemsize,
        **measured,
    }


def limit(measured: dict[str, int]) -> int:
    """Bytes that loading may take at its peak."""
    return measured["weights"] + measured["largest"] + SLACK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=600, help="size of each checkpoint")
    parser.add_argument("--load", metavar="DIRECTORY", help="load this checkpoint and print what it took")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load_and_measure(args.load)))
        return
    print("| checkpoint | file | weights in bfloat16 | largest tensor | peak | peak - weights | in the end |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    failed = False
    for name, (_, dtype) in CASES.items():
        measured = measure(name, args.megabytes)
        above = measured["peak"] - measured["weights"]
        columns = [measured[key] for key in ("file", "weights", "largest", "peak")] + [above, measured["end"]]
        print(f"| {name}, {dtype.name} | " + " | ".join(f"{x / MB:.0f} MB" for x in columns) + " |", flush=True)
        failed |= measured["peak"] > limit(measured)
    sys.exit(failed)


if __name__ == "__main__":
    main()
