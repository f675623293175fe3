"""Options that several commands have, as tables, and what they become for the library."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

__all__ = [
    "MODEL_OPTIONS",
    "SAMPLING_OPTIONS",
    "add_model_options",
    "add_table",
    "model_options",
    "positive",
    "print_stats",
    "sampling_params",
]

Converter = Callable[[str], Any]
OptionKinds = tuple[tuple[str, Converter, str, str], ...]


def positive(text: str) -> int:
    """A whole number of at least 1."""
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
        limits[modality.strip()] = positive(count)
    return limits


SAMPLING_OPTIONS: OptionKinds = (
    ("top_p", float, "X", "nucleus mass"),
    ("top_k", int, "N", "candidates kept"),
    ("min_p", float, "X", "floor relative to the most likely token"),
    ("presence_penalty", float, "X", "for tokens that the answer has"),
    ("frequency_penalty", float, "X", "for each time that the answer has a token"),
    ("repetition_penalty", float, "X", "above 1 repeats less"),
)
MODEL_OPTIONS: OptionKinds = (
    ("tokenizer", str, "PATH", "a directory or hub id; the model's if none"),
    ("revision", str, "NAME", "hub branch, tag or commit"),
    ("seed", int, "N", "of the sampled tokens; for batch, the base of the seeds of lines without one (0)"),
    ("max_model_len", positive, "N", "tokens of prompt and answer together"),
    ("limit_mm_per_prompt", _limits, "M=N,...", "items of one prompt, image=2 say"),
    ("mm_processor_kwargs", _object, "JSON", "options for the image processor"),
    ("video_sampling", _object, "JSON", "frames taken of video files: num_frames, or fps, min_frames, max_frames"),
    ("hf_overrides", _object, "JSON", "config fields to replace"),
    ("max_image_pixels", positive, "N", "largest width x height that is decoded"),
    ("max_num_batched_tokens", positive, "N", "prompt tokens of one step"),
    ("tensor_parallel_size", positive, "N", "devices that the model is divided over"),
    ("data_parallel_size", positive, "N", "copies of the model, each on so many devices of its own"),
    ("encoder_parallel", str, "HOW", "items: each of these encodes media of its own; weights: all of them each item"),
    ("page_size", positive, "N", "tokens of one KV page"),
    ("kv_cache_memory", str, "SIZE", "KV pages in bytes, 512MiB say"),
    ("memory_fraction", float, "X", "share of an accelerator's memory that may be used"),
    ("encoder_cache_tokens", positive, "N", "rows of encoded media kept on device"),
    ("max_encode_items", positive, "N", "media items that are encoded together (8)"),
    ("preprocess_workers", positive, "N", "threads that open and process media ahead of the device (2)"),
    ("compilation_cache_dir", str, "DIR", "where compiled programs are kept between runs"),
    ("programs_dir", str, "DIR", "where they are kept whole, to start without tracing; such as plan --export writes"),
)


def add_table(group: Any, options: OptionKinds) -> None:
    """Add a table's options to a parser or to a group of one."""
    for name, kind, metavar, text in options:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add which model, and how the engine runs it."""
    group = parser.add_argument_group("model and engine")
    group.add_argument("--model", default=None, help="a directory or hub id; the small model that ships if none")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of weights and compute")
    add_table(group, MODEL_OPTIONS)
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


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options for `LLM` that were given."""
    names = [*(name for name, *_ in MODEL_OPTIONS), "dtype", "media_roots"]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def sampling_params(args: argparse.Namespace) -> Any:
    """The `SamplingParams` of the options that were given; a value out of range ends the command."""
    from aphrodite_jax.errors import ConfigError
    from aphrodite_jax.sampling_params import SamplingParams

    names = ["max_tokens", "temperature", "stop", "seed", *(name for name, *_ in SAMPLING_OPTIONS)]
    try:
        return SamplingParams(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    except ConfigError as error:
        args.usage_error(str(error).removeprefix("SamplingParams: "))


def print_stats(args: argparse.Namespace, llm: Any) -> None:
    """What ``--stats`` asks for."""
    if args.stats:
        print(json.dumps(llm.stats(), indent=1), file=sys.stderr)
