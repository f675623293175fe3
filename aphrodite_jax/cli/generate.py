"""Answer one question about images, or about none."""

import argparse
from collections.abc import Iterator
from typing import Any

from aphrodite_jax.cli.options import (
    SAMPLING_OPTIONS,
    add_model_options,
    add_table,
    model_options,
    print_stats,
    sampling_params,
)

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
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
    add_table(group, SAMPLING_OPTIONS)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the answer as it grows."""
    from aphrodite_jax.llm import LLM

    params = sampling_params(args)
    options = model_options(args)
    if args.image:
        options["limit_mm_per_prompt"] = {"image": len(args.image), **options.get("limit_mm_per_prompt", {})}
    # One question needs few of the programs, so they are compiled as it comes to them.
    llm = LLM(args.model, max_num_seqs=1, warm_up=False, **options)
    for piece in _pieces(llm, _prompt(llm, args), params):
        print(piece, end="", flush=True)
    print()
    print_stats(args, llm)
    return 0


def _prompt(llm: Any, args: argparse.Namespace) -> Any:
    if args.raw:
        return {"prompt": args.question, "multi_modal_data": {"image": args.image} if args.image else {}}
    content = [{"type": "image", "image": image} for image in args.image]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": args.question}]})
    return llm.render_chat(messages)


def _pieces(llm: Any, prompt: Any, params: Any) -> Iterator[str]:
    """The answer's text as it grows."""
    length = 0
    for output in llm.stream(prompt, params):
        if output.error is not None:
            raise output.error
        (answer,) = output.outputs
        yield answer.text[length:]
        length = len(answer.text)
