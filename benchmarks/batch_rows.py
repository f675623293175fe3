"""A batch job of many rows with images: its memory as it goes on, and its rows a second beside `LLM.generate`.

    python benchmarks/batch_rows.py                    # 100,000 rows, about a quarter of an hour on two cores
    python benchmarks/batch_rows.py --rows 5000

The model that ships answers a JSONL file whose rows each name one of a few hundred small pictures and ask a short
question; answers are greedy and a few tokens long. The job goes through one engine to a directory of parts, a tenth of
them at a time; after each tenth the same engine generates for the same rows, given as a list whose prompts are rendered
already, so that both meet the same moods of the machine. The engine's caches are emptied before each. Memory is the
resident set of the process, every 1,000 rows of the job. The last line of stdout is the result as JSON.
"""

import argparse
import collections
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from workers import machine, say

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.batch import PartsJob, open_parts, run_parts

SAMPLED_EVERY = 1000
WARM_UP_ROWS = 256
TURNS = 10
QUESTIONS = ("What is this?", "What color is it?", "Is it a circle?", "Which digit is this?")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=300, help="pictures that differ (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--without-generate", action="store_true", help="run the job alone")
    options = parser.parse_args()
    llm = LLM(max_num_seqs=options.max_num_seqs, max_model_len=128, show_progress=False)
    seconds, cpu_seconds, memory = collections.Counter(), collections.Counter(), [(0, rss_mib())]
    with tempfile.TemporaryDirectory(prefix="batch-rows-") as directory:
        pictures = write_pictures(Path(directory), options.images)
        warm_up = make_job(llm, Path(directory) / "warm-up", pictures, WARM_UP_ROWS, options.max_tokens)
        run_parts(llm, warm_up, show_progress=False)
        generate(llm, pictures, range(WARM_UP_ROWS), options.max_tokens)
        job = make_job(llm, Path(directory) / "job", pictures, options.rows, options.max_tokens)
        sample_memory(job, memory)
        failed = 0
        for turn in range(TURNS):
            units = range(turn * job.num_units // TURNS, (turn + 1) * job.num_units // TURNS)
            rows = [row for unit in job.units(units) for row in range(unit.first_row, unit.first_row + unit.num_rows)]
            llm.engine.reset_caches()
            began = time.process_time()
            report = run_parts(llm, job, units, show_progress=False)
            cpu_seconds["job"] += time.process_time() - began
            seconds["job"] += report.seconds
            failed += report.failed
            if rows and not options.without_generate:
                began = time.process_time()
                seconds["generate"] += generate(llm, pictures, rows, options.max_tokens)
                cpu_seconds["generate"] += time.process_time() - began
        if not job.finish() or failed:
            raise RuntimeError(f"the job is not complete: {failed} rows failed")
    rates = {name: options.rows / value for name, value in seconds.items()}
    print(f"{'rows':>9} {'MiB':>7}")
    for rows, mib in memory[:: max(1, len(memory) // 10)]:
        print(f"{rows:9} {mib:7.1f}")
    for name, rate in rates.items():
        print(f"{name:>9} {rate:7.1f} rows/s {cpu_seconds[name]:7.1f} CPU s")
    settled = [mib for rows, mib in memory if rows >= min(10_000, options.rows // 2)]
    result = {
        "benchmark": "batch_rows",
        "rows": options.rows,
        "images": options.images,
        "rows_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "job_over_generate": round(rates["job"] / rates["generate"], 3) if "generate" in rates else None,
        "rss_mib": {
            "first": memory[0][1],
            "settled": settled[0],
            "last": memory[-1][1],
            "most": max(m for _, m in memory),
        },
        "last_over_settled_memory": round(memory[-1][1] / settled[0], 3),
        "machine": machine([]),
    }
    print(json.dumps(result))


def write_pictures(directory: Path, count: int) -> list[Path]:
    """Pictures of one colored square each."""
    rng = np.random.default_rng(1522)
    paths = []
    for index in range(count):
        pixels = np.full((48, 48, 3), 255, np.uint8)
        top, left = rng.integers(4, 20, 2)
        pixels[top : top + 24, left : left + 24] = rng.integers(0, 256, 3)
        paths.append(directory / f"{index:04}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def messages(pictures: list[Path], row: int) -> list[dict]:
    """Of a row: neighbors ask about the same picture."""
    content = [
        {"type": "image_url", "image_url": {"url": pictures[row // 2 % len(pictures)].as_uri()}},
        {"type": "text", "text": QUESTIONS[row % len(QUESTIONS)]},
    ]
    return [{"role": "user", "content": content}]


def write_rows(path: Path, pictures: list[Path], rows: int, max_tokens: int) -> Path:
    """A JSONL file of so many rows, at ``path``."""
    with open(path, "w") as file:
        for row in range(rows):
            body = {"messages": messages(pictures, row), "max_tokens": max_tokens, "temperature": 0}
            line = {"custom_id": f"row-{row}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            print(json.dumps(line), file=file)
    return path


def make_job(llm: LLM, directory: Path, pictures: list[Path], rows: int, max_tokens: int) -> PartsJob:
    """A job of so many rows in a directory of its own."""
    directory.mkdir()
    requests = write_rows(directory / "requests.jsonl", pictures, rows, max_tokens)
    began = time.monotonic()
    job = open_parts(requests, directory / "answers", model_config=llm.model_config)
    say(f"{rows} rows: the job was made in {time.monotonic() - began:.1f} s")
    return job


def sample_memory(job: PartsJob, memory: list[tuple[int, float]]) -> None:
    """Note rows that were answered and MiB, as the job goes on."""
    record, counted = job.source.record, itertools.count(1)

    def noted(row, output):
        count = next(counted)
        if count % SAMPLED_EVERY == 0:
            memory.append((count, rss_mib()))
        return record(row, output)

    job.source.record = noted


def generate(llm: LLM, pictures: list[Path], rows: Sequence[int], max_tokens: int) -> float:
    """Seconds that `LLM.generate` takes for some rows."""
    rendered = [llm.render_chat(messages(pictures, row)) for row in range(len(QUESTIONS))]
    prompts = []
    for row in rows:
        image = {"image": [str(pictures[row // 2 % len(pictures)])]}
        prompts.append({**rendered[row % len(QUESTIONS)], "multi_modal_data": image})
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    llm.engine.reset_caches()
    began = time.monotonic()
    llm.generate(prompts, params, on_error="raise", use_tqdm=False)
    return time.monotonic() - began


def rss_mib() -> float:
    """Resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


if __name__ == "__main__":
    main()
