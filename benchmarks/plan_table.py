"""Plans four published models for slices of three TPUs, and writes the table of docs/planning.md.

    python benchmarks/plan_table.py                                # all, one after another: about an hour on two cores
    python benchmarks/plan_table.py --only gemma3_27b v6e:2x4
    python benchmarks/plan_table.py --write docs/planning.md --lines plans.jsonl

Each plan is a process of ``aphrodite-jax plan``, which compiles for a TPU that is not there. Configs and processor
files are those of tests/published. One line of JSON a plan goes to stdout: the plan, seconds of wall time and of CPU
time.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from kernels_pallas.benchmark.tables import replace_between

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
MODELS = {
    "llava_1.5_7b": ("LLaVA-1.5-7B", "llava_1.5", []),
    "llava_next_34b": ("LLaVA-NeXT-34B", "llava_next", []),
    "gemma3_27b": ("Gemma-3-27B", "gemma3", ["--max-model-len", "8192"]),
    "qwen2_5_vl_72b": (
        "Qwen2.5-VL-72B",
        "qwen2_5_vl",
        ["--max-model-len", "8192", "--mm-processor-kwargs", '{"max_pixels": 1003520}'],
    ),
}
"""Config to the model's name, its processor's folder, and options of its plans."""
SLICES = {
    "llava_1.5_7b": ("v5e:2x2", "v5p:1x1x1", "v6e:1x1"),
    "llava_next_34b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"),
    "gemma3_27b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"),
    "qwen2_5_vl_72b": ("v5e:4x4", "v5e:4x8", "v5p:2x2x1", "v6e:2x4"),
}


def main() -> None:
    """Print the lines, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "TOPOLOGY"), help="one plan")
    parser.add_argument("--lines", type=Path, help="lines that were printed before")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table of --lines between the marks in FILE")
    options = parser.parse_args()
    if options.write:
        lines = [json.loads(line) for line in options.lines.read_text().splitlines()]
        options.write.write_text(replace_between(options.write.read_text(), "plan", table(lines)))
        return
    wanted = [options.only] if options.only else [(model, x) for model, slices in SLICES.items() for x in slices]
    for model, topology in wanted:
        print(json.dumps(plan(model, topology)), flush=True)


def plan(model: str, topology: str) -> dict:
    """One plan, with how long it took."""
    _, processor, options = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / model
        shutil.copytree(PUBLISHED / "processors" / processor, directory)
        shutil.copyfile(PUBLISHED / f"{model}.json", directory / "config.json")
        begin, before = time.perf_counter(), _cpu()
        command = [
            sys.executable,
            "-m",
            "aphrodite_jax",
            "plan",
            "--json",
            "--model",
            directory,
            "--topology",
            topology,
        ]
        done = subprocess.run([*map(str, command), *options], stdout=subprocess.PIPE, text=True)
        took = {"seconds": time.perf_counter() - begin, "cpu_seconds": _cpu() - before}
    found = json.loads(done.stdout) if done.stdout else {"error": done.returncode}
    return {"model": model, "topology": topology, **took, "plan": found}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(lines: Iterable[dict]) -> str:
    """Rows of Markdown."""
    head = (
        "model", "slice", "weights", "code", "hungriest program", "encoder cache", "KV tokens", "decode, ms",
        "decode bytes over needed", "prefill, ms", "images a second", "tokens a second", "CPU seconds",
    )  # fmt: skip
    rows = [head, ["---"] * len(head)]
    order = [(model, topology) for model, slices in SLICES.items() for topology in slices]
    for line in sorted(lines, key=lambda line: order.index((line["model"], line["topology"]))):
        found = line["plan"]
        memory, estimates, throughput = found["memory"], found["estimates"], found["throughput"]
        row = [MODELS[line["model"]][0], line["topology"]]
        row += [f"{memory[name] / 2**30:.2f}" for name in ("weights", "code", "temporary", "encoder_cache")]
        if found["fits"]:
            needed = estimates["decode_weights_read"] + estimates["decode_kv_read_counted"]
            row += [
                f"{memory['kv_tokens']:,}",
                f"{1e3 * estimates['decode']['seconds']:.1f}",
                f"{estimates['decode_bytes_counted'] / needed:.3f}",
                f"{1e3 * estimates['prefill']['seconds']:.1f}",
                f"{throughput['images_per_second']:.1f}",
                f"{throughput['output_tokens_per_second']:,.0f}",
            ]
        else:
            row += ["does not fit", *"-----"]
        rows.append([*row, f"{line['cpu_seconds']:.0f}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
