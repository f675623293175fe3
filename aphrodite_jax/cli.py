"""The command ``aphrodite-jax``: answers to stdout, everything else to stderr.

The library is imported by the command that needs it, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aphrodite_jax

__all__ = ["main"]

_EXIT_STATUS = """\
exit status:
  0    done
  1    the request was refused, or the model, the input or the output can't be used
  2    the command line is wrong
  3    batch: every line has its answer or its error, and at least one has an error
  130  interrupted
  141  whoever read stdout has gone
"""

_BATCH_DESCRIPTION = """\
Answer an OpenAI batch file: one JSON object a line, with custom_id, method, url (/v1/chat/completions or
/v1/completions) and body. The output has one line for each, in the same order. A bad line gets its own error
and leaves the others alone. A run that was killed goes on where it ended when the same command is given
again, and ends with the bytes of an undisturbed run; OUTPUT.job.json keeps whose answers these are.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argparse itself exits with 2 for a wrong command line."""
    args = _parser().parse_args(argv)
    try:
        status = args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except BrokenPipeError:
        status = 141
    except Exception as error:
        if args.debug:
            raise
        status = _fail(_one_line(error), 1)
    _flush_or_drop_stdout()
    return status


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be gone; the status still tells
        print(f"aphrodite-jax: {message}", file=sys.stderr)
    return status


def _flush_or_drop_stdout() -> None:
    """Where stdout takes nothing, let its buffer go nowhere: Python would fail on it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _one_line(error: Exception) -> str:
    from aphrodite_jax.errors import AphroditeError

    message = " ".join(str(error).split())
    if isinstance(error, AphroditeError | OSError):
        return f"error: {message}"
    return f"error: {type(error).__name__}: {message} (run with --debug to see where)"


# The commands.


def _generate(args: argparse.Namespace) -> int:
    from aphrodite_jax.llm import LLM

    sampling_params = _sampling_params(args)
    options = _model_options(args)
    if args.image:
        options["limit_mm_per_prompt"] = {"image": len(args.image), **options.get("limit_mm_per_prompt", {})}
    # One question needs few of the programs, so they are compiled as it comes to them.
    llm = LLM(args.model, max_num_seqs=1, warm_up=False, **options)
    for piece in _pieces(llm, _prompt(llm, args), sampling_params):
        print(piece, end="", flush=True)
    print()
    _print_stats(args, llm)
    return 0


def _prompt(llm: Any, args: argparse.Namespace) -> Any:
    if args.raw:
        return {"prompt": args.question, "multi_modal_data": {"image": args.image} if args.image else {}}
    content = [{"type": "image", "image": image} for image in args.image]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": args.question}]})
    return llm.render_chat(messages)


def _pieces(llm: Any, prompt: Any, sampling_params: Any) -> Iterator[str]:
    """The answer's text as it grows."""
    length = 0
    for output in llm.stream(prompt, sampling_params):
        if output.error is not None:
            raise output.error
        (answer,) = output.outputs
        yield answer.text[length:]
        length = len(answer.text)


def _batch(args: argparse.Namespace) -> int:
    from aphrodite_jax.batch import answer_job, open_job
    from aphrodite_jax.config import ModelConfig

    options = _model_options(args)
    of_model = {field.name for field in dataclasses.fields(ModelConfig)} & set(options)
    model_config = ModelConfig(model=args.model, **{name: options[name] for name in of_model})
    with open_job(
        args.requests,
        args.output,
        model_config=model_config,
        max_tokens=args.max_tokens,
        served_model_names=tuple(args.served_model_name),
    ) as job:
        report = job.report()
        if not job.is_complete:
            from aphrodite_jax.llm import LLM

            llm = LLM(args.model, max_num_seqs=args.max_num_seqs, **options)
            report = answer_job(llm, job)
            _print_stats(args, llm)
    print(
        f"{args.output}: {report.num_answered} answered, {report.num_failed} with an error"
        + (f", {report.num_resumed} of them by an earlier run" if report.num_resumed else ""),
        file=sys.stderr,
    )
    return 3 if report.num_failed else 0


def _print_stats(args: argparse.Namespace, llm: Any) -> None:
    if args.stats:
        print(json.dumps(llm.stats(), indent=1), file=sys.stderr)


def _models(args: argparse.Namespace) -> int:
    from aphrodite_jax.architectures import known_architectures, resolve_architecture
    from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY

    rows = [("ARCHITECTURE", "TAKES", "CLASS", "TRAITS")]
    for name in known_architectures():
        architecture, _, tower = name.partition("/")
        model_cls = resolve_architecture([architecture], tower=tower or None)
        takes = ", ".join(["text", *MULTIMODAL_REGISTRY.modalities(model_cls)])
        traits = "; ".join(getattr(model_cls, "traits", ()))
        rows.append((name, takes, f"{model_cls.__module__}.{model_cls.__qualname__}", traits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


# Options.

Converter = Callable[[str], Any]
_OPTION_KINDS = tuple[tuple[str, Converter, str, str], ...]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _limits(text: str) -> dict[str, int]:
    limits = {}
    for item in text.split(","):
        modality, _, count = item.partition("=")
        if not modality.strip() or not count.strip().isdecimal():
            raise argparse.ArgumentTypeError(f"must be like image=2 or image=2,video=1, got {text!r}")
        limits[modality.strip()] = _positive(count)
    return limits


_SAMPLING_OPTIONS: _OPTION_KINDS = (
    ("top_p", float, "X", "nucleus mass"),
    ("top_k", int, "N", "candidates kept"),
    ("min_p", float, "X", "floor relative to the most likely token"),
    ("presence_penalty", float, "X", "for tokens that the answer has"),
    ("frequency_penalty", float, "X", "for each time that the answer has a token"),
    ("repetition_penalty", float, "X", "above 1 repeats less"),
)
_MODEL_OPTIONS: _OPTION_KINDS = (
    ("tokenizer", str, "PATH", "a directory or hub id; the model's if none"),
    ("revision", str, "NAME", "hub branch, tag or commit"),
    ("seed", int, "N", "of the sampled tokens; for batch, the base of the seeds of lines without one (0)"),
    ("max_model_len", _positive, "N", "tokens of prompt and answer together"),
    ("limit_mm_per_prompt", _limits, "M=N,...", "items of one prompt, image=2 say"),
    ("mm_processor_kwargs", _object, "JSON", "options for the image processor"),
    ("video_sampling", _object, "JSON", "frames taken of video files: num_frames, or fps, min_frames, max_frames"),
    ("hf_overrides", _object, "JSON", "config fields to replace"),
    ("max_image_pixels", _positive, "N", "largest width x height that is decoded"),
    ("max_num_batched_tokens", _positive, "N", "prompt tokens of one step"),
    ("tensor_parallel_size", _positive, "N", "devices that the model is divided over"),
    ("page_size", _positive, "N", "tokens of one KV page"),
    ("kv_cache_memory", str, "SIZE", "KV pages in bytes, 512MiB say"),
    ("memory_fraction", float, "X", "share of an accelerator's memory that may be used"),
    ("encoder_cache_tokens", _positive, "N", "rows of encoded media kept on device"),
    ("compilation_cache_dir", str, "DIR", "where compiled programs are kept between runs"),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aphrodite-jax",
        description="Answers from pictures and text, with models in Hugging Face format, in JAX.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {aphrodite_jax.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str = ""):
        sub = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            epilog=_EXIT_STATUS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # an option that is not given is not passed on
        )
        sub.set_defaults(command=run, usage_error=sub.error)
        sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        return sub

    _add_generate_options(command("generate", _generate, "answer one question about images, or about none"))
    _add_batch_options(command("batch", _batch, "answer the requests of a file", _BATCH_DESCRIPTION))
    command("models", _models, "list the architectures that can be served, and what they take")
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", help="what to ask")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture; give it again for more"
    )
    parser.add_argument("--system", metavar="TEXT", default=None, help="a system message")
    parser.add_argument(
        "--raw", action="store_true", default=False, help="the question is the prompt as is, with placeholders"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens at most (256)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, the default")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given again")
    _add_options(group, _SAMPLING_OPTIONS)
    _add_model_options(parser)


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests", help="the batch file")
    parser.add_argument("-o", "--output", required=True, help="where the answers go")
    parser.add_argument("--max-tokens", type=_positive, default=None, metavar="N", help="for lines that don't say")
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which lines may ask for the model, beside its own; may be given again",
    )
    parser.add_argument(
        "--max-num-seqs", type=_positive, default=16, metavar="N", help="requests that run at a time (16)"
    )
    _add_model_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and engine")
    group.add_argument("--model", default=None, help="a directory or hub id; the small model that ships if none")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of weights and compute")
    _add_options(group, _MODEL_OPTIONS)
    group.add_argument(
        "--stats", action="store_true", default=False, help="at the end, print counts and times as JSON to stderr"
    )
    group.add_argument(
        "--media-root",
        action="append",
        dest="media_roots",
        metavar="DIR",
        help="the only place that images may be read from; may be given again",
    )


def _add_options(group: Any, options: _OPTION_KINDS) -> None:
    for name, kind, metavar, text in options:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options for `LLM` that were given."""
    names = [*(name for name, *_ in _MODEL_OPTIONS), "dtype", "media_roots"]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _sampling_params(args: argparse.Namespace) -> Any:
    from aphrodite_jax.errors import ConfigError
    from aphrodite_jax.sampling_params import SamplingParams

    names = ["max_tokens", "temperature", "stop", "seed", *(name for name, *_ in _SAMPLING_OPTIONS)]
    try:
        return SamplingParams(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    except ConfigError as error:
        args.usage_error(str(error).removeprefix("SamplingParams: "))
