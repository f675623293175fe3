"""Jobs on a local Ray cluster of two cores, and what became of them, as one JSON object.

python ray_driver.py ROWS_FILE DIRECTORY
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import haste

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=1 {haste.FLAGS}"  # of each worker
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - with Ray's 15 its workers would wait for all other tests

import dataclasses
import json
import signal
import threading
import time

import psutil
import ray

from aphrodite_jax.batch import open_parts
from aphrodite_jax.batch.on_ray import RayOptions, run_on_ray
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import AphroditeError

ROWS_PER_PART = 8
ENGINE = {"max_num_seqs": 4, "warm_up": False, "show_progress": False}


def job_of(rows: Path, name: str) -> dict:
    return {"input_path": str(rows), "output_path": str(OUT / name), "rows_per_part": ROWS_PER_PART}


def ids(job: dict) -> list[str]:
    parts = sorted((Path(job["output_path"]) / "parts").iterdir())
    return [json.loads(line)["custom_id"] for part in parts for line in part.read_text().splitlines()]


def run(job: dict, *, engine: dict | None = None, **options) -> dict:
    ray_options = RayOptions(**{name: options.pop(name) for name in ("workers", "hosts") if name in options})
    try:
        report = run_on_ray(job, engine or ENGINE, ray_options, show_progress=False, **options)
    except AphroditeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return dataclasses.asdict(report)


def kill_one(job: dict, killed: list[int]) -> None:
    """A worker, once the first part is there."""
    done = Path(job["output_path"]) / "done"
    while not (done.is_dir() and any(done.iterdir())):
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "MapWorker" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)
            return


def with_a_kill(job: dict) -> dict:
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(job, killed), daemon=True)
    killer.start()
    report = run(job, workers=2)
    killer.join(timeout=1)
    complete = open_parts(**job, model_config=ModelConfig()).finish()
    again = run(job, workers=2)
    return {"killed": len(killed), "report": report, "complete": complete, "again": again, "ids": ids(job)}


def main() -> None:
    rows = Path(sys.argv[1])
    bad = OUT / "bad.jsonl"
    bad.write_text(rows.read_text().replace("example.png", "missing.png"))
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    told = {"kill": with_a_kill(job_of(rows, "kill"))}
    hosts = job_of(rows, "hosts")
    told["hosts"] = {"report": run(hosts, engine={**ENGINE, "tensor_parallel_size": 2}, hosts=2), "ids": ids(hosts)}
    told["error"] = run(job_of(rows, "error"), engine={**ENGINE, "max_num_batched_tokens": 1})
    told["failures"] = run(job_of(bad, "failures"), max_failures=5)
    ray.shutdown()  # from here on a cluster is started and ended by the job itself
    stop = threading.Event()
    stop.set()
    told["stop"] = run(job_of(rows, "stop"), stop=stop)
    told["left behind"] = ray.is_initialized()
    print(json.dumps(told))


if __name__ == "__main__":
    OUT = Path(sys.argv[2])
    main()
