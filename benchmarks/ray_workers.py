"""A batch job on Ray with one worker and with two, each held to a core of its own: rows a second.

    python benchmarks/ray_workers.py

The model that ships answers a JSONL file about a few hundred small pictures (as `batch_rows.py`) on a local cluster.
A worker's start is not counted: rates are those of the parts that come between the moment when every worker has put one
in its place and the end of the last one. The last line of stdout is the result as JSON.
"""

import argparse
import json
import os
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
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--images", type=int, default=300, help="pictures that differ (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4)
    options = parser.parse_args()
    # A program's own threads would take the other worker's core.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    rates = {}
    with tempfile.TemporaryDirectory(prefix="ray-workers-") as directory:
        pictures = write_pictures(Path(directory), options.images)
        rows = write_rows(Path(directory) / "rows.jsonl", pictures, options.rows, options.max_tokens)
        for workers in (1, 2):
            rates[workers] = rate(rows, Path(directory) / f"out {workers}", workers)
            print(f"{workers} worker{'s' * (workers > 1)}: {rates[workers]:.1f} rows/s", flush=True)
    result = {
        "benchmark": "ray_workers",
        "rows": options.rows,
        "rows_per_second": {str(workers): round(value, 1) for workers, value in rates.items()},
        "two_over_one": round(rates[2] / rates[1], 3),
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
    counted = marks[workers:]
    return sum(rows for _, rows in counted) / (marks[-1][0] - marks[workers - 1][0])


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
