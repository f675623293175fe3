"""Say what a model takes and gives on devices that need not be there.

From the model's config and processor files alone, without weights: its real programs are compiled by the real
compiler. Bytes are what the compiler says; times are floors from bytes and operations, and estimates. The TPU compiler
comes with the extra ``compile``.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile

from aphrodite_jax.cli.options import MODEL_OPTIONS, add_table, model_options, positive

__all__ = ["add_options", "run"]

_NOT_PLANNED = ("seed", "max_image_pixels", "preprocess_workers", "compilation_cache_dir", "programs_dir")
"""Options of a model and its engine that change nothing of a plan."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--topology", required=True, help="v5e:2x4, v5p:2x2x2, v6e:1x1, ..., or a GPU: a100, l4, h100")
    group = parser.add_argument_group("the work to plan for")
    group.add_argument("--requests", type=positive, metavar="N", help="at a time on a copy (--max-num-seqs)")
    group.add_argument("--prompt-tokens", type=positive, metavar="N", help="of text in a prompt (32)")
    group.add_argument("--output-tokens", type=positive, metavar="N", help="of an answer (64)")
    group.add_argument("--images-per-prompt", type=int, metavar="N", help="1, or 0 for a text model")
    group.add_argument("--image-size", type=_size, metavar="WxH", help="pixels, before the processor (1024x768)")
    group.add_argument("--price-per-hour", type=float, metavar="X", help="of all devices: tells the cost of images")
    group = parser.add_argument_group("what to do")
    group.add_argument("--json", action="store_true", default=False, help="print the plan as JSON")
    group.add_argument("--export", metavar="DIR", help="compile all programs and keep them there, for --programs-dir")
    group.add_argument(
        "--kernel-estimate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the compiler's estimate of the attention kernels",
    )
    group = parser.add_argument_group("model and engine")
    group.add_argument("--model", help="a directory, a hub id or a config.json; the small model that ships if none")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of weights and compute")
    group.add_argument(
        "--max-num-seqs", type=positive, default=16, metavar="N", help="requests that run at a time on a copy (16)"
    )
    add_table(group, tuple(row for row in MODEL_OPTIONS if row[0] not in _NOT_PLANNED))


def run(args: argparse.Namespace) -> int:
    """Do it; 0 where the model fits, 1 where it does not."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device of this machine is wanted
    from aphrodite_jax.config import EngineConfig, ModelConfig
    from aphrodite_jax.planning import Workload, as_json, as_text, find_target, make_plan, with_processor

    target = find_target(args.topology)
    model = getattr(args, "model", None)
    options = model_options(args)
    options["max_num_seqs"] = args.max_num_seqs
    copies = options.get("data_parallel_size", 1)
    devices = options.setdefault("tensor_parallel_size", max(1, len(target.devices) // copies))
    options.setdefault("data_parallel_size", max(1, len(target.devices) // devices))
    if hasattr(args, "export"):
        options["programs_dir"] = args.export
    images = getattr(args, "images_per_prompt", 0)
    if images > 1:
        options["limit_mm_per_prompt"] = {"image": images, **options.get("limit_mm_per_prompt", {})}
    of_model = {field.name for field in dataclasses.fields(ModelConfig)}
    work = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Workload) if hasattr(args, field.name)
    }
    with tempfile.TemporaryDirectory() as folder:
        if model is not None:
            options["model"] = with_processor(model, folder)
        plan = make_plan(
            ModelConfig(**{name: x for name, x in options.items() if name in of_model}),
            EngineConfig(
                **{name: x for name, x in options.items() if name not in of_model}, show_progress=sys.stderr.isatty()
            ),
            target,
            Workload(**work),
            estimate_kernels=args.kernel_estimate,
            price_per_hour=getattr(args, "price_per_hour", None),
            export=hasattr(args, "export"),
        )
    plan = dataclasses.replace(plan, model=model or plan.model)
    print(json.dumps(as_json(plan), indent=1) if args.json else as_text(plan))
    return 0 if plan.fits else 1


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be like 1024x768, got {text!r}")
    return int(width), int(height)
