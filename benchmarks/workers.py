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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from checkpoints import DIRECTORY, WRITERS, checkpoint

ENGINES = Path(__file__).resolve().parent / "engines"
NAMES = ("ours", "transformers", "vllm")
MAX_NUM_SEQS = 64
MAX_MODEL_LEN = 2048
KV_CACHE_GIB = 2
WARM_UP = 99
"""Number of the repeat that is not counted; its requests are unlike those of the others."""

THREADS: dict[str, tuple[str, dict[str, str]]] = {
    "1": ("1 thread", {"OMP_NUM_THREADS": "1"}),
    "2": ("2 threads, passive", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}),
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
      setting: what tells this process from others of the same engine; may be empty.
      python: the interpreter of the engine's environment.
      environment: variables that are set for the process.
      log: where its messages go.
      options: for the engine's ``start``.

    Raises:
      RuntimeError: the engine didn't start; the message tells the end of its log.
    """

    def __init__(self, name: str, setting: str, python: str, environment: Mapping[str, str], log: Path, **options):
        self.name, self.setting, self.log = name, setting, log
        self.label = f"{name}, {setting}" if setting else name
        script = ENGINES / ("ours.py" if name == "ours" else f"{name}_engine.py")
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env={"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"} | os.environ | environment,
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

    def cpu_seconds(self) -> float:
        """Processor time that the engine's processes have taken so far; 0 where there is no ``/proc``."""
        fields = [text.rsplit(")", 1)[1].split() for text in _proc_files(self.process.pid, "stat")]
        # utime and stime of proc(5), 12th and 13th after the name in brackets
        return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, int]:
        """MiB that the engine's processes hold now, and the most that each held; 0 where there is no ``/proc``."""
        sums = {"VmRSS": 0, "VmHWM": 0}
        for text in _proc_files(self.process.pid, "status"):
            for line in text.splitlines():
                field, _, value = line.partition(":")
                if field in sums:
                    sums[field] += int(value.split()[0])
        return {"rss_mib": sums["VmRSS"] // 1024, "peak_rss_mib": sums["VmHWM"] // 1024}

    def close(self) -> None:
        """End the process, and wait for it."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _ask(self, question: dict) -> dict:
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(question), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            answer = json.loads(line)
        else:
            answer = {"error": f"the process ended with status {self.process.wait()}"}
        if "error" in answer:
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{self.name}: {answer['error']}; the end of {self.log}:\n{tail}")
        return answer


def add_options(parser: argparse.ArgumentParser, *, engines: Sequence[str], default: str = "") -> None:
    """The options that all benchmarks have; ``default`` are the engines that run unless others are asked for."""
    parser.add_argument("--checkpoint", choices=WRITERS, default="small")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where checkpoints are written")
    if len(engines) > 1:
        parser.add_argument("--only", default=default or ",".join(engines), help=f"of {','.join(engines)}")
        parser.add_argument("--threads", default=",".join(THREADS), help="settings of the peers to try: %(default)s")
        parser.add_argument("--vllm-python", help="interpreter of vLLM's environment; without it vLLM is left out")


@contextmanager
def workers(
    options: argparse.Namespace,
    *,
    variants: Mapping[str, Mapping[str, Any]] = MappingProxyType({"": {}}),
    limits: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[list[Worker]]:
    """The engines that the options ask for; they end with the context.

    Args:
      options: of `add_options`.
      variants: of ours, each a process: names to options of `LLM`. Peers run once for each of `THREADS`.
      limits: more options for ours and for vLLM, where they have the same names.
    """
    path = str(checkpoint(options.checkpoint, options.directory))
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN, **limits}
    names = getattr(options, "only", "ours").split(",")
    if unknown := set(names) - set(NAMES):
        raise SystemExit(f"--only takes {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    vllm_python = getattr(options, "vllm_python", None)
    if "vllm" in names and vllm_python is None:
        names.remove("vllm")
        say("vLLM is left out: --vllm-python tells where it is")
    if unknown := set(filter(None, getattr(options, "threads", "").split(","))) - set(THREADS):
        raise SystemExit(f"--threads takes {', '.join(THREADS)}, got {', '.join(sorted(unknown))}")
    settings = [THREADS[threads] for threads in getattr(options, "threads", "").split(",") if threads]
    kinds: dict[str, list[tuple]] = {
        "ours": [(name, sys.executable, {}, {**limits, **variant}) for name, variant in variants.items()],
        "transformers": [(name, sys.executable, threads, {}) for name, threads in settings],
        "vllm": [(name, vllm_python, vllm_environment(vllm_python) | threads, limits) for name, threads in settings]
        if vllm_python
        else [],
    }
    logs = Path(tempfile.mkdtemp(prefix="benchmark-"))
    with ExitStack() as stack:
        started = []
        for name in names:
            for setting, python, environment, arguments in kinds[name]:
                log = logs / f"{len(started)}-{name}.log"
                worker = Worker(name, setting, python, environment, log, checkpoint=path, **arguments)
                stack.callback(worker.close)
                say(f"{worker.label}: started in {worker.start_seconds:.0f} s")
                started.append(worker)
        yield started


def vllm_environment(python: str) -> dict[str, str]:
    """Variables for vLLM's process, and the libraries that it advises to load first, where its environment has them."""
    found = sorted(Path(python).absolute().parents[1].glob("lib/lib[it]*.so*"))
    preloaded = [str(file) for file in found if file.name.startswith(("libiomp5.so", "libtcmalloc"))]
    return {
        "LD_PRELOAD": ":".join(preloaded),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the number of threads is OMP_NUM_THREADS, as for the others
    }


def numbered(repeats: int) -> Iterator[tuple[int, str]]:
    """Number and name of each run: the warm-up first."""
    yield WARM_UP, "warm-up"
    for repeat in range(repeats):
        yield repeat, f"repeat {repeat + 1} of {repeats}"


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


def _proc_files(pid: int, name: str) -> Iterator[str]:
    """A file of ``/proc`` for a process and for each that it started."""
    with suppress(FileNotFoundError):  # it ended, or this is another system than Linux
        yield Path(f"/proc/{pid}/{name}").read_text()
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from _proc_files(int(child), name)
