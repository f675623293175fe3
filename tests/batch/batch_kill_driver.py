"""Run a job of the fake LLM in ten processes that are killed at random moments, then in one that is not.

    python batch_kill_driver.py DIRECTORY SEED

Forks after the imports, so that a run takes milliseconds to start.
"""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

from batch_fakes import FakeLLM

from aphrodite_jax.batch import run_batch

KILLS = 10


def run(llm: FakeLLM, directory: Path) -> None:
    report = run_batch(llm, directory / "requests.jsonl", directory / "answers.jsonl", show_progress=False)
    print(f"{report.num_resumed} resumed", flush=True)


def main(directory: Path, seed: int) -> None:
    warnings.simplefilter("ignore")  # jax warns of forks; no device is used here
    rng = random.Random(seed)
    llm = FakeLLM(directory / "model", step_seconds=0.002)
    assert llm.model_config.context_length  # read here, for all
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            run(llm, directory)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        size = (directory / "answers.jsonl").stat().st_size if (directory / "answers.jsonl").exists() else 0
        print(f"killed: {os.WIFSIGNALED(status)} at {size} bytes", flush=True)
    run(llm, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
