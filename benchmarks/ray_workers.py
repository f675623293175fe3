"""A batch job on Ray with one worker and with two, each held to a core of its own: rows a second.

    python benchmarks/ray_workers.py

The model that ships answers a JSONL file about a few hundred small pictures (as `batch_rows.py`) on a local cluster.
Rates are those of the parts between a quarter and seven eighths of the job: all workers have started then, and
none is without work. One and two workers take turns, and a rate is the mean of its rounds. The last line of stdout is
the result as JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import threading
from pathlib import Path

import psutil
from batch_rows import write_pictures, write_rows
from workers import machine

from aphrodite_jax.batch.on_ray import RayOptions, run_on_ray

ROWS_PER_PART = 128


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=300, help="pictures that differ (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4)
    options = parser.parse_args()
    # A program's own threads would take the other worker's core.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="ray-workers-") as directory:
        pictures = write_pictures(Path(directory), options.images)
        rows = write_rows(Path(directory) / "rows.jsonl", pictures, options.rows, options.max_tokens)
        for turn, workers in itertools.product(range(options.rounds), rates):
            rates[workers].append(rate(rows, Path(directory) / f"out {turn} {workers}", workers))
            print(f"{workers} worker{'s' * (workers > 1)}: {rates[workers][-1]:.1f} rows/s", flush=True)
    means = {workers: statistics.mean(values) for workers, values in rates.items()}
    result = {
        "benchmark": "ray_workers",
        "rows": options.rows,
        "rows_per_second": {str(workers): [round(value, 1) for value in values] for workers, values in rates.items()},
        "two_over_one": round(means[2] / means[1], 3),
        "machine": machine([]),
    }
    print(json.dumps(result))


def rate(rows: Path, output: Path, workers: int) -> float:
    """Rows a second of a job while all its workers are at work."""
    ended = threading.Event()
    pinner = threading.Thread(target=pin, args=(workers, ended), daemon=True)
    pinner.start()
    job = {"input_path": str(rows), "output_path": str(output), "rows_per_part": ROWS_PER_PART}
    engine = {"max_num_seqs": 16, "max_model_len": 128, "preprocess_workers": 1, "show_progress": False}
    report = run_on_ray(job, engine, RayOptions(workers=workers), show_progress=False)
    ended.set()
    pinner.join()
    assert report.answered == report.rows, report
    marks = sorted((path.stat().st_mtime, json.loads(path.read_text())["rows"]) for path in (output / "done").iterdir())
    begin, end = len(marks) // 4, len(marks) * 7 // 8
    return sum(rows for _, rows in marks[begin + 1 : end + 1]) / (marks[end][0] - marks[begin][0])


def pin(workers: int, ended: threading.Event) -> None:
    """Hold each worker's threads to a core of its own, also those that begin later."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    while not ended.wait(1.0):
        processes = [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or ())]
        for process, core in zip(sorted(processes, key=lambda p: p.pid), cores, strict=False):
            for thread in Path(f"/proc/{process.pid}/task").glob("*"):
                os.sched_setaffinity(int(thread.name), {core})


if __name__ == "__main__":
    main()
