"""Engines in processes of their own, and the requests that the benchmarks send them.

Thread settings hold for a process, so each engine runs in one for each setting and is started once; repeats of all
engines take turns, so that a busy moment of the machine does not fall on one alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import DIRECTORY, WRITERS, checkpoint

ENGINES = Path(__file__).resolve().parent / "engines"
NAMES = ("ours", "transformers", "vllm")
MAX_NUM_SEQS = 64
MAX_MODEL_LEN = 2048
KV_CACHE_GIB = 2

THREADS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
}
"""Settings of OpenMP for the peers: two threads that spin while they wait slow each other down on two cores."""

QUESTIONS = (
    "what is in the picture?",
    "which color is most of it?",
    "how many blocks are there?",
    "what is in the middle of it, and what is to the left of that?",
    "describe the picture in a few words",
    "is it brighter at the top or at the bottom?",
    "name three colors that you see",
    "what would you call it?",
)


class Worker:
    """An engine that answers calls.

    Args:
      name: one of `NAMES`.
      threads: a key of `THREADS`; None leaves the process as it is.
      python: the interpreter of the engine's environment.
      log: where its messages go.
      options: for the engine's ``start``.

    Raises:
      RuntimeError: the engine didn't start; the message tells the end of its log.
    """

    def __init__(self, name: str, threads: str | None, python: str, log: Path, **options):
        self.name, self.threads, self.log = name, threads, log
        script = ENGINES / {"ours": "ours.py"}.get(name, f"{name}_engine.py")
        settings = THREADS[threads] if threads else {}
        if name == "vllm":
            settings = settings | {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env={"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"} | os.environ | settings,
            text=True,
        )
        started = self._ask(options)
        self.start_seconds: float = started["seconds"]
        self.versions: dict[str, str] = started["versions"]

    def call(self, function: str, **arguments) -> dict:
        """The answer of one of the engine's functions.

        Raises:
          RuntimeError: it failed; the message tells the end of its log.
        """
        return self._ask({"call": function, **arguments})

    def memory(self) -> dict[str, int]:
        """MiB that the engine's processes hold now, and the most that they held; Linux tells it."""
        now = peak = 0
        for pid in _family(self.process.pid):
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            now, peak = now + int(fields["VmRSS"].split()[0]), peak + int(fields["VmHWM"].split()[0])
        return {"rss_mib": now // 1024, "peak_rss_mib": peak // 1024}

    def close(self) -> None:
        """End the process, and wait for it."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _ask(self, line: dict) -> dict:
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(line), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{self.name}: {answer['error']}; the end of {self.log}:\n{tail}")
        return answer


def add_options(parser: argparse.ArgumentParser, *, engines: tuple[str, ...]) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--checkpoint", choices=WRITERS, default="small")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where checkpoints are written")
    parser.add_argument("--only", default=",".join(engines), help=f"engines, of {','.join(engines)}")
    if "vllm" in engines:
        parser.add_argument(
            "--vllm-python", help="interpreter of an environment with vLLM; without it vLLM is left out"
        )


@contextmanager
def workers(options: argparse.Namespace, **of_ours) -> Iterator[list[Worker]]:
    """The engines that the options ask for, once for each thread setting; ``of_ours`` are options of `LLM`."""
    path = str(checkpoint(options.checkpoint, options.directory))
    names = options.only.split(",")
    unknown = set(names) - set(NAMES)
    if unknown:
        raise SystemExit(f"--only takes {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    vllm_python = getattr(options, "vllm_python", None)
    if "vllm" in names and vllm_python is None:
        names.remove("vllm")
        say("vLLM is left out: --vllm-python tells where it is")
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN}
    starts: dict[str, tuple[str, dict[str, Any]]] = {
        "ours": (sys.executable, limits | of_ours),
        "transformers": (sys.executable, {}),
        "vllm": (vllm_python, limits),
    }
    logs = Path(tempfile.mkdtemp(prefix="benchmark-"))
    with ExitStack() as stack:
        started = []
        for name in names:
            python, arguments = starts[name]
            for threads in (None,) if name == "ours" else THREADS:
                log = logs / f"{name}-{len(started)}.log"
                worker = Worker(name, threads, python, log, checkpoint=path, **arguments)
                stack.callback(worker.close)
                say(f"{label(worker)} started in {worker.start_seconds:.0f} s")
                started.append(worker)
        yield started


def requests(lengths: list[int], repeat: int, *, num_images: int = 1, text_length: int = 0) -> list[dict]:
    """A request for each answer's length in tokens.

    Args:
      lengths: tokens of each answer.
      repeat: number of the repeat; its images and questions are its own, so that no cache knows them.
      num_images: images of each request.
      text_length: characters, which are tokens of the checkpoint ``small``, that the question is filled up to.
    """
    made = []
    for index, length in enumerate(lengths):
        number = repeat * 100_000 + index
        question = f"{QUESTIONS[index % len(QUESTIONS)]} (question {number})"
        question += "".join(f" {word}" for word in range(text_length))[: max(0, text_length - len(question))]
        images = [number * 16 + image for image in range(num_images)]
        text = f"USER: {'<image>' * num_images}\n{question} ASSISTANT:"
        made.append({"text": text, "images": images, "max_tokens": length})
    return made


def mixed_lengths(count: int) -> list[int]:
    """Lengths of answers from 8 to 128 tokens, the same at each call; the first 64 have 3,812 tokens."""
    return np.random.default_rng(1521).integers(8, 129, count).tolist()


def label(worker: Worker) -> str:
    """An engine and its setting, for a table."""
    return f"{worker.name}, {worker.threads}" if worker.threads else worker.name


def machine(started: list[Worker]) -> dict:
    """What the numbers hold for: the processor, its cores, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {f"{worker.name}: {name}": value for worker in started for name, value in worker.versions.items()}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
    }


def say(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def _family(pid: int) -> Iterator[int]:
    """A process and those that it started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))
