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
from pathlib import Path
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argparse itself exits with 2 for a wrong command line."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit; there must be someone to take it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        return _fail(_one_line(error), 1)


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be gone; the status still tells
        print(f"aphrodite-jax: {message}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    from aphrodite_jax.errors import AphroditeError

    message = " ".join(str(error).split())
    if isinstance(error, AphroditeError | OSError):
        return f"error: {message}"
    return f"error: {type(error).__name__}: {message} (run with --debug to see where)"


def _generate(args: argparse.Namespace) -> int:
    from aphrodite_jax.llm import LLM

    options = _model_options(args)
    if args.image:
        options["limit_mm_per_prompt"] = {"image": len(args.image), **options.get("limit_mm_per_prompt", {})}
    sampling_params = _sampling_params(args)
    llm = LLM(args.model, max_num_seqs=1, **options)
    for piece in _pieces(llm, _prompt(llm, args), sampling_params):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


def _prompt(llm: Any, args: argparse.Namespace) -> Any:
    from aphrodite_jax.inputs import render_chat

    images = [_url(image) for image in args.image]
    if args.raw:
        return {"prompt": args.question, "multi_modal_data": {"image": images} if images else {}}
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": args.question}]})
    return render_chat(messages, llm.tokenizer, llm.model_config)


def _url(image: str) -> str:
    return image if image.startswith("data:") or "://" in image else Path(image).absolute().as_uri()


def _pieces(llm: Any, prompt: Any, sampling_params: Any) -> Iterator[str]:
    """The answer's text as it grows."""
    length = 0
    for output in llm.stream(prompt, sampling_params):
        if output.error is not None:
            raise output.error
        for answer in output.outputs:
            yield answer.text[length:]
            length = len(answer.text)


def _sampling_params(args: argparse.Namespace) -> Any:
    from aphrodite_jax.errors import ConfigError
    from aphrodite_jax.sampling_params import SamplingParams

    names = [field.name for field in dataclasses.fields(SamplingParams)]
    try:
        return SamplingParams(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    except ConfigError as error:
        args.usage_error(str(error))


def _batch(args: argparse.Namespace) -> int:
    from aphrodite_jax.batch import answer_job, open_job
    from aphrodite_jax.config import ModelConfig
    from aphrodite_jax.llm import LLM

    options = _model_options(args)
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    model_config = ModelConfig(
        model=args.model, **{name: value for name, value in options.items() if name in names}
    )
    with open_job(
        args.requests,
        args.output,
        model_config=model_config,
        max_tokens=args.max_tokens,
        served_model_names=tuple(args.served_model_name),
    ) as job:
        report = job.report()
        if not job.is_complete:
            llm = LLM(args.model, max_num_seqs=args.max_num_seqs, **options)
            report = answer_job(llm, job, max_in_flight=2 * args.max_num_seqs)
    print(
        f"{args.output}: {report.num_answered} answered, {report.num_failed} with an error"
        + (f", {report.num_resumed} of them by an earlier run" if report.num_resumed else ""),
        file=sys.stderr,
    )
    return 3 if report.num_failed else 0


def _models(args: argparse.Namespace) -> int:
    raise NotImplementedError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aphrodite-jax",
        description="Answers from pictures and text, with models in Hugging Face format, in JAX.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    command("models", _models, "list the architectures that can be served, and their traits")
    return parser


_BATCH_DESCRIPTION = """\
Answer an OpenAI batch file: one JSON object a line, with custom_id, method, url (/v1/chat/completions or
/v1/completions) and body. The output has one line for each, in the same order. A bad line gets its own error
and leaves the others alone. A run that was killed goes on where it ended when the same command is given
again, and ends with the bytes of an undisturbed run; OUTPUT.job.json keeps whose answers these are.
"""


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", help="what to ask")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture; give it again for more"
    )
    parser.add_argument("--system", metavar="TEXT", default=None, help="a system message")
    parser.add_argument(
        "--raw",
        action="store_true",
        default=False,
        help="the question is the prompt as is, with placeholders",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens at most (256)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, the default")
    group.add_argument("--top-p", type=float, metavar="X", help="nucleus mass")
    group.add_argument("--top-k", type=int, metavar="N", help="candidates kept")
    group.add_argument("--min-p", type=float, metavar="X", help="floor relative to the most likely token")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 repeats less")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given again")
    _add_model_options(parser)


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests", help="the batch file")
    parser.add_argument("-o", "--output", required=True, help="where the answers go")
    parser.add_argument(
        "--max-tokens", type=_positive, default=None, metavar="N", help="for lines that don't say"
    )
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
    group.add_argument(
        "--model", default=None, help="a directory or hub id; the small model that ships if none"
    )
    group.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of weights and compute"
    )
    for name, kind, metavar, text in _MODEL_OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--media-root",
        action="append",
        dest="media_roots",
        metavar="DIR",
        help="the only place that file: URLs may read; may be given again",
    )
    group.add_argument(
        "--no-warm-up", action="store_false", dest="warm_up", help="compile as requests need it"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _limits(text: str) -> dict[str, int]:
    limits = {}
    for item in text.split(","):
        modality, _, count = item.partition("=")
        limits[modality.strip()] = _positive(count)
    return limits


_MODEL_OPTIONS: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
    ("tokenizer", str, "PATH", "a directory or hub id; the model's if none"),
    ("revision", str, "NAME", "hub branch, tag or commit"),
    ("seed", int, "N", "base of the seeds of requests that give none (0)"),
    ("max_model_len", _positive, "N", "tokens of prompt and answer together"),
    ("limit_mm_per_prompt", _limits, "M=N,...", "items of one prompt, image=2 say"),
    ("mm_processor_kwargs", _object, "JSON", "options for the image processor"),
    ("hf_overrides", _object, "JSON", "config fields to replace"),
    ("max_image_pixels", _positive, "N", "largest width x height that is decoded"),
    ("max_num_batched_tokens", _positive, "N", "prompt tokens of one step"),
    ("page_size", _positive, "N", "tokens of one KV page"),
    ("kv_cache_memory", str, "SIZE", "KV pages in bytes, 512MiB say"),
    ("memory_fraction", float, "X", "share of an accelerator's memory that may be used"),
    ("encoder_cache_tokens", _positive, "N", "rows of encoded media kept on device"),
    ("compilation_cache_dir", str, "DIR", "where compiled programs are kept between runs"),
)


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options for `LLM` that were given."""
    names = [*(name for name, *_ in _MODEL_OPTIONS), "dtype", "media_roots", "warm_up"]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
