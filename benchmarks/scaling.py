"""Throughput and memory against the number of requests, the length of their prompts and the number of their images.

    python benchmarks/scaling.py                                                  # ours
    python benchmarks/scaling.py --only ours,vllm --vllm-python VENV/bin/python   # offline_throughput.py sets vLLM up
    python benchmarks/scaling.py --sweeps requests --requests 1,64,512 --repeats 1

Three sweeps: 1 to 512 requests of mixed answers of 8 to 128 tokens; 16 requests of 32 tokens' answers with longer and
longer texts (in characters, which are tokens of the checkpoint ``small``); the same with 0 to 8 images. Tokens a second
are those of answers, and of prompts and answers together: the median of repeats, each with images of its own, after one
run that is not counted. Memory is the resident set of the engine's processes after a point, and its peak so far. The
last line of stdout is the result as JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable

from workers import MAX_NUM_SEQS, WARM_UP, add_options, machine, mixed_lengths, numbered, requests, say, workers

SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int, int], list[dict]]]] = {
    "requests": (
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        lambda count, repeat: requests(mixed_lengths(count), repeat),
    ),
    "text": (
        (64, 128, 256, 512, 1024, 1536),
        lambda length, repeat: requests([32] * 16, repeat, text_length=length),
    ),
    "images": (
        (0, 1, 2, 4, 8),
        lambda count, repeat: requests([32] * 16, repeat, num_images=count),
    ),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="those to run, of %(default)s")
    for name, (points, _) in SWEEPS.items():
        parser.add_argument(f"--{name}", default=",".join(map(str, points)), help="points of this sweep: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, engines=("ours", "vllm"), default="ours")
    options = parser.parse_args()
    sweeps = {name: [int(point) for point in getattr(options, name).split(",")] for name in options.sweeps.split(",")}
    images = max(sweeps.get("images", [1]))
    table: dict[str, dict[str, list[dict]]] = {}
    with workers(options, limits={"limit_mm_per_prompt": {"image": max(images, 1)}}) as started:
        print(f"checkpoint {options.checkpoint}, at most {MAX_NUM_SEQS} requests at the same time")
        print(
            f"{'sweep':>9} {'point':>6}  {'engine':28} {'tokens/s':>9} {'with prompts':>13} {'MiB':>6} {'peak MiB':>9}"
        )
        for sweep, points in sweeps.items():
            for point in points:
                for name, row in measure(started, SWEEPS[sweep][1], point, options.repeats).items():
                    table.setdefault(name, {}).setdefault(sweep, []).append({sweep: point} | row)
                    rates = f"{row['tokens_per_second']:9.1f} {row['all_tokens_per_second']:13.1f}"
                    memory = f"{row['rss_mib']:6} {row['peak_rss_mib']:9}"
                    print(f"{sweep:>9} {point:6}  {name:28} {rates} {memory}", flush=True)
        where = machine(started)
    print(json.dumps({"benchmark": "scaling", "checkpoint": options.checkpoint, "engines": table, "machine": where}))


def measure(started, make_requests: Callable[[int, int], list[dict]], point: int, repeats: int) -> dict[str, dict]:
    """Rates and memory of each engine at one point."""
    seconds: dict[str, list[float]] = {}
    rows: dict[str, dict] = {}
    for repeat, called in numbered(repeats):
        asked = make_requests(point, repeat)
        for worker in started:
            answer = worker.call("generate", requests=asked)
            if repeat != WARM_UP:
                seconds.setdefault(worker.label, []).append(answer["seconds"])
            output = sum(len(tokens) for tokens in answer["tokens"])
            rows[worker.label] = {"output": output, "all": output + answer["prompt_tokens"]} | worker.memory()
        say(f"{point}: {called} done")
    for name, row in rows.items():
        median = statistics.median(seconds[name])
        row["tokens_per_second"] = round(row.pop("output") / median, 1)
        row["all_tokens_per_second"] = round(row.pop("all") / median, 1)
    return rows


if __name__ == "__main__":
    main()
