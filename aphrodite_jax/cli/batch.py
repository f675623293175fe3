"""Answer many rows: the lines of an OpenAI batch file, the images of a folder, the rows of Parquet files or of a
datasets folder, the samples of tar shards.

A JSONL INPUT with an OUTPUT that ends in .jsonl gives one file with a line for each, in the same order; a bad line has
its own error there. Any other OUTPUT is a directory (or an address that fsspec opens), written in parts; bad rows go to
errors/ in it. A run that was killed goes on where it ended when the same command is given again, and several runs may
share the parts of a directory (--worker). There, SIGTERM and Ctrl-C let rows that run come to their end, within 30
seconds.
"""

import argparse
import dataclasses
import os
import sys
from typing import Any

from aphrodite_jax.cli.options import (
    SAMPLING_OPTIONS,
    add_model_options,
    add_table,
    model_options,
    positive,
    print_stats,
)

__all__ = ["add_options", "run"]

_FORMS = ("jsonl", "folder", "parquet", "datasets", "webdataset")
_COLUMNS = ("image", "prompt", "id")
_OF_ROWS = ("prompt", "system", "temperature", "stop", *(f"{name}_column" for name in _COLUMNS))
_OF_PARTS = ("rows_per_part", "worker", "max_failures", "processes", "engine")
_OF_RAY = ("ray_workers", "ray_resources", "ray_hosts", "ray_slice", "ray_address")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("input", metavar="INPUT", help="a file, a folder or a pattern; local, or any address of fsspec")
    parser.add_argument("-o", "--output", required=True, help="a name that ends in .jsonl, or a directory")
    parser.add_argument("--format", choices=_FORMS, help="of the input; found by what it is if not given")
    parser.add_argument("--max-tokens", type=positive, default=None, metavar="N", help="for rows that don't say")
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which lines may ask for the model, beside its own; may be given again",
    )
    parser.add_argument(
        "--max-num-seqs", type=positive, default=16, metavar="N", help="requests that run at a time (16)"
    )
    group = parser.add_argument_group("a directory of parts")
    group.add_argument("--rows-per-part", type=positive, metavar="N", help="rows of the input for each part (1024)")
    group.add_argument("--worker", type=_share, metavar="I/N", help="do the parts of worker I of N, from 0/N to N-1/N")
    group.add_argument("--max-failures", type=_count, metavar="N", help="stop when more than N rows have failed")
    group = parser.add_argument_group("several machines, for a directory of parts")
    group.add_argument(
        "--processes",
        metavar="WHERE",
        help="this is one of several processes of JAX, which all get this command: auto, where JAX finds the others by "
        "itself, as on a TPU slice, or HOST:PORT,PROCESSES,INDEX",
    )
    group.add_argument("--engine", choices=["local", "ray"], help="ray shares the parts out among workers of a cluster")
    group.add_argument("--ray-workers", type=positive, metavar="N", help="models in all (1)")
    group.add_argument("--ray-resources", type=_amounts, metavar="R=N,...", help="of a worker's host: CPU=1, or TPU=4")
    group.add_argument("--ray-hosts", type=positive, metavar="N", help="hosts that each model is divided over (1)")
    group.add_argument("--ray-slice", metavar="V:TOPOLOGY", help="a TPU slice for each model, v5e:4x4 say")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster; RAY_ADDRESS, or one of this machine alone"
    )
    group = parser.add_argument_group("rows that are no OpenAI requests")
    group.add_argument(
        "--prompt", metavar="TEXT", help="what to ask of every row; with --prompt-column, of rows without"
    )
    group.add_argument("--system", metavar="TEXT", help="a system message")
    for name in _COLUMNS:
        group.add_argument(f"--{name}-column", metavar="NAME", help=f"where a row has its {name}")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy, the default")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given again")
    add_table(group, SAMPLING_OPTIONS)
    add_model_options(parser)


def _share(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be like 0/4 for the first of four workers, got {text!r}")
    return int(index), int(count)


def _amounts(text: str) -> dict[str, float]:
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {name.strip(): float(amount) for name, amount in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like CPU=1 or TPU=4,CPU=8, got {text!r}") from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of rows, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Answer what is unanswered."""
    if _is_one_file(args):
        return _run_file(args)
    on_ray = getattr(args, "engine", "local") == "ray"
    for name in ("processes", "worker") if on_ray else _OF_RAY:
        if hasattr(args, name):
            needs = "goes without --engine ray, which places workers itself" if on_ray else "needs --engine ray"
            args.usage_error(f"--{name.replace('_', '-')} {needs}")
    if on_ray and args.stats:
        args.usage_error("--stats goes without --engine ray, whose workers count for themselves")
    return _run_on_ray(args) if on_ray else _run_parts(args)


def _is_one_file(args: argparse.Namespace) -> bool:
    """Whether a JSONL input goes to one file, in its order."""
    others = (".parquet", ".tar", ".tar.gz", ".tgz")
    form = getattr(args, "format", None)
    is_jsonl = form == "jsonl" or (
        form is None and not os.path.isdir(args.input) and not args.input.lower().endswith(others)
    )
    if not args.output.endswith(".jsonl") or os.path.isdir(args.output):
        return False
    if not is_jsonl or "://" in args.input + args.output:
        args.usage_error("-o: an OUTPUT that ends in .jsonl is for a local JSONL file; give a directory")
    of_parts, of_rows = (*_OF_PARTS, *_OF_RAY), (*_OF_ROWS, *(name for name, *_ in SAMPLING_OPTIONS))
    given = [name for name in (*of_rows, *of_parts) if hasattr(args, name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        reason = "needs an OUTPUT that is a directory" if given[0] in of_parts else "is for rows that are no requests"
        args.usage_error(f"{option} {reason}")
    return True


def _model_config(args: argparse.Namespace) -> Any:
    from aphrodite_jax.config import ModelConfig

    options = model_options(args)
    of_model = {field.name for field in dataclasses.fields(ModelConfig)} & set(options)
    return ModelConfig(model=args.model, **{name: options[name] for name in of_model})


def _load(args: argparse.Namespace) -> Any:
    from aphrodite_jax.llm import LLM

    options = model_options(args)
    if hasattr(args, "processes"):  # all of their devices have work
        import jax

        copies = jax.device_count() // options.get("tensor_parallel_size", 1)
        options.setdefault("data_parallel_size", max(1, copies))
    return LLM(args.model, max_num_seqs=args.max_num_seqs, **options)


def _run_file(args: argparse.Namespace) -> int:
    from aphrodite_jax.batch import answer_job, open_job

    with open_job(
        args.input,
        args.output,
        model_config=_model_config(args),
        max_tokens=args.max_tokens,
        served_model_names=tuple(args.served_model_name),
    ) as job:
        report = job.report()
        if not job.is_complete:
            llm = _load(args)
            report = answer_job(llm, job)
            print_stats(args, llm)
    print(
        f"{args.output}: {report.num_answered} answered, {report.num_failed} with an error"
        + (f", {report.num_resumed} of them by an earlier run" if report.num_resumed else ""),
        file=sys.stderr,
    )
    return 3 if report.num_failed else 0


def _run_parts(args: argparse.Namespace) -> int:
    from aphrodite_jax.batch import open_parts, run_parts
    from aphrodite_jax.batch.parts import PartsReport
    from aphrodite_jax.batch.preemption import Preemption
    from aphrodite_jax.executor.processes import initialize

    llm, index, count, leads = None, *getattr(args, "worker", (0, 1)), True
    if hasattr(args, "processes"):
        initialize(args.processes)  # which takes SIGTERM for itself, until it is taken back
    with Preemption() as stop:
        job = open_parts(**_job_options(args), model_config=_model_config(args))
        if hasattr(args, "processes"):  # which parts are this process's, its devices tell
            llm = _load(args)
            share, shares = llm.engine.share_of_work
            index, count = index * shares + share, count * shares
            leads = llm.engine.lockstep is None or llm.engine.lockstep.leads
        indices = range(index, job.num_units, count) if count > 1 else None
        name = f"report-{index}-of-{count}" if count > 1 else "report"
        if leads:
            job.write_report(None, name)
        standing = job.standing(indices)
        if llm is None and standing.is_complete:
            report = PartsReport.of_nothing_left(standing)
        else:
            llm = llm or _load(args)
            with stop.rows_run():
                report = run_parts(
                    llm, job, indices, stop=stop, max_failures=getattr(args, "max_failures", None), show_progress=leads
                )
            print_stats(args, llm)
        if leads:
            complete = job.finish()
            job.write_report(report, name)
            print(_summary(args.output, report, complete), file=sys.stderr)
    return _status(report, stop)


def _run_on_ray(args: argparse.Namespace) -> int:
    from aphrodite_jax.batch import open_parts
    from aphrodite_jax.batch.on_ray import RayOptions, run_on_ray
    from aphrodite_jax.batch.preemption import Preemption

    given = {name.removeprefix("ray_"): getattr(args, name) for name in _OF_RAY if hasattr(args, name)}
    if "slice" in given:
        given["tpu_slice"] = given.pop("slice")
    options = RayOptions(**given)
    llm_options = {
        "model": args.model,
        "max_num_seqs": args.max_num_seqs,
        "show_progress": False,
        **model_options(args),
    }
    with Preemption() as stop:
        job = open_parts(**_job_options(args), model_config=_model_config(args))
        job.write_report(None)
        with stop.rows_run():
            max_failures = getattr(args, "max_failures", None)
            report = run_on_ray(_job_options(args), llm_options, options, stop=stop, max_failures=max_failures)
        complete = job.finish()
        job.write_report(report)
    print(_summary(args.output, report, complete), file=sys.stderr)
    return _status(report, stop)


def _job_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `open_parts` but for the model."""
    sampling_names = ("temperature", "stop", *(name for name, *_ in SAMPLING_OPTIONS))
    return {
        "input_path": args.input,
        "output_path": args.output,
        "form": getattr(args, "format", None),
        "prompt": getattr(args, "prompt", None),
        "system": getattr(args, "system", None),
        "columns": {name: getattr(args, f"{name}_column") for name in _COLUMNS if hasattr(args, f"{name}_column")},
        "sampling": {name: getattr(args, name) for name in sampling_names if hasattr(args, name)},
        "max_tokens": args.max_tokens,
        "served_model_names": tuple(args.served_model_name),
        "rows_per_part": getattr(args, "rows_per_part", None),
    }


def _status(report: Any, stop: Any) -> int:
    if report.stopped:
        return stop.status if stop.is_set() else 143  # another process was told to
    if report.held:
        return 4
    return 3 if report.failed else 0


def _summary(output: str, report: Any, complete: bool) -> str:
    said = f"{output}: {report.answered} answered, {report.failed} failed of {report.rows} rows"
    if report.resumed:
        said += f", {report.resumed} of them by earlier runs"
    if report.stopped:
        said += "; stopped: the same command goes on from here"
    elif report.held:
        said += f"; another run works on {report.held} of the parts"
    elif not complete:
        said += "; parts of other workers are not there yet"
    return said
