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


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(directory: Path, seed: int) -> None:
    warnings.simplefilter("ignore")  # jax warns of forks; no device is used here
    rng, answers = random.Random(seed), directory / "answers.jsonl"
    llm = FakeLLM(directory / "model", step_seconds=0.002)
    assert llm.model_config.context_length  # read here, for all
    for kill in range(KILLS):
        # Every other run is killed as early as may be, the rest only when it has written something.
        enough = size_of(answers) + rng.randrange(1, 8000) if kill % 2 else 0
        child = os.fork()
        if child == 0:
            run(llm, directory)
            os._exit(0)
        while size_of(answers) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(f"killed: {os.WIFSIGNALED(status)} at {size_of(answers)} bytes", flush=True)
    run(llm, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
