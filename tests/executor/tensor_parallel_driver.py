"""Answers of goldens on virtual CPU devices, and what each program's devices tell each other, as one JSON object.

python tensor_parallel_driver.py NAME:DEVICES ...
"""

import collections
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))


import jax
from golden_files import media_of, read_golden

from aphrodite_jax import LLM, SamplingParams

COLLECTIVES = r"= [^=\n]*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def run(name: str, devices: int) -> dict:
    golden = read_golden(name)
    directory = golden.write_checkpoint(Path(tempfile.mkdtemp()) / name)
    llm = LLM(
        directory,
        dtype="float32",
        limit_mm_per_prompt=golden.media_limits,
        tensor_parallel_size=devices,
        compilation_cache_dir=None,
        warm_up=False,
        show_progress=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    prompts = [
        {"prompt_token_ids": prompt.prompt.tolist(), "multi_modal_data": media_of(prompt)} for prompt in golden.prompts
    ]
    outputs = llm.generate(prompts, params, on_error="raise", use_tqdm=False)
    runner = llm.engine.runner
    whole = sum(x.nbytes for x in jax.tree.leaves(runner._params))
    return {
        "right": [
            output.outputs[0].token_ids == tuple(prompt.tokens.tolist())
            for output, prompt in zip(outputs, golden.prompts, strict=True)
        ],
        "layers": runner.num_layers,
        "share": runner.memory_budget().weights / whole,
        "collectives": {
            program.name: collections.Counter(re.findall(COLLECTIVES, program.call.as_text()))
            for program in runner.programs.table()
        },
    }


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps({case: run(*case.split(":")[:1], int(case.split(":")[1])) for case in sys.argv[1:]}))
