"""Measures the kernels on a target, and writes the tables of docs/kernels.md.

    python -m kernels_pallas.bench --target v5e --case a f64          # TPU: the compiler's estimate, needs `libtpu`
    python -m kernels_pallas.bench --target h100                      # GPU: registers, spills, shared memory
    python -m kernels_pallas.bench --target cpu --case e577           # wall time on this machine
    python -m kernels_pallas.bench --target gpu                       # wall time on this machine's GPU
    python -m kernels_pallas.bench --write docs/kernels.md            # v5e and v6e, and the GPUs where possible

The table of times on a GPU is written from lines of ``--target gpu`` that ``--lines`` names. One line of JSON a case
goes to standard output; all is in the order of the cases. On a TPU, ``estimate`` is the
compiler's, in thousands of cycles, of the kernels alone; ``floors`` are what the matrix units and main memory need
for what is seen; ``cycles`` is the estimate, or memory's floor where that is more (kernel by kernel, where a case has
two), since the compiler's model takes memory for faster than it is. The estimate is made of a part
(``measured_part``, of the heads or sequences) and multiplied; ``temp_bytes`` is of the part. ``peers`` holds the same
of JAX's kernels, and ``ratio``, their cycles to ours, or the reason why a peer has none. A case that fails gives a
line with "error", and exit status 1 at the end.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import argparse
import concurrent.futures
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.benchmark import targets
from kernels_pallas.benchmark.cases import CASES
from kernels_pallas.benchmark.tables import gpu_table, measured_table, replace_between, tpu_table
from kernels_pallas.compile_only import gpu

__all__ = ["lines", "main"]

WRITTEN = ("v5e", "v6e")
"""Chips of the table."""
WORKERS = 2
"""Compilers at work at a time, at most."""

Measure = Callable[..., dict[str, Any]]


def lines(wanted: Iterable[tuple[str, str]], *, measure: Measure, **options: Any) -> Iterator[dict[str, Any]]:
    """What ``measure`` tells of each ``(case, target)``, in order; one that fails gives "error"."""

    def one(case: str, target: str) -> dict[str, Any]:
        try:
            return measure(case, target, **options)
        except targets.CannotMeasure as error:
            said = str(error)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        return {"case": case, "target": target, "op": CASES[case].op, "error": said}

    wanted = list(wanted)
    # Where time is taken nothing else may run.
    workers = 1 if any(target in targets.HERE for _, target in wanted) else WORKERS
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, *zip(*wanted, strict=True))


def main(arguments: list[str] | None = None, measure: Measure = targets.measure) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.bench", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=targets.TARGETS)
    what.add_argument("--write", type=Path, metavar="FILE", help="rewrite the tables between the marks in FILE")
    parser.add_argument("--case", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure peers too")
    parser.add_argument("--seconds", type=float, default=5, help="on cpu and gpu: time for each case")
    parser.add_argument("--lines", nargs="+", type=Path, metavar="FILE", help="with --write: lines measured before")
    options = parser.parse_args(arguments)
    if options.target is not None:
        if options.lines:
            parser.error("--lines goes with --write")
        wanted = [(case, options.target) for case in options.case or CASES]
        found = []
        for line in lines(wanted, measure=measure, peers=options.peers, seconds=options.seconds):
            print(json.dumps(line), flush=True)
            found.append(line)
    else:
        if options.case or not options.peers:
            parser.error("--write takes all cases, and peers")
        found = _write(options.write, options.lines, measure)
    return int(any("error" in line for line in found))


def _write(path: Path, measured: list[Path] | None, measure: Measure) -> list[dict[str, Any]]:
    text = path.read_text()
    for name in ("tpu", "gpu", "measured"):
        replace_between(text, name, "")  # before an hour of compiling: are the marks there?
    if measured:
        found = [json.loads(line) for file in measured for line in file.read_text().splitlines()]
    else:
        wanted = [(case, chip) for case in CASES for chip in WRITTEN]
        if gpu.missing() is None:
            wanted += [(case, card) for case in CASES for card in gpu.CARDS]
        else:
            print(f"The table of GPUs stays as it is: {gpu.missing()}", file=sys.stderr)
        found = []
        for line in lines(wanted, measure=measure):
            print(json.dumps(line), flush=True)
            found.append(line)
    tables = ("tpu", tpu_table, targets.TPUS), ("gpu", gpu_table, gpu.CARDS), ("measured", measured_table, ("gpu",))
    for name, make, those in tables:
        some = [line for line in found if line["target"] in those]
        if some:
            text = replace_between(text, name, make(some))
    path.write_text(text)
    return found


if __name__ == "__main__":
    if "gpu" not in sys.argv:
        jax.config.update("jax_platforms", "cpu")  # compilers work in processes of their own
    sys.exit(main())
