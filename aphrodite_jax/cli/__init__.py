"""The command ``aphrodite-jax``: answers to stdout, everything else to stderr.

A module for each command: ``add_options`` fills its parser, ``run`` does it and returns the exit status. The library is
imported by the command that needs it, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import aphrodite_jax
from aphrodite_jax.cli import batch, generate, models, plan

__all__ = ["main"]

_EXIT_STATUS = """\
exit status:
  0    done
  1    the request was refused, or the model, the input or the output can't be used
  2    the command line is wrong
  3    batch: every line has its answer or its error, and at least one has an error
  4    batch: all is done but parts that another run works on
  130  interrupted; batch: rows that ran have come to their end
  141  whoever read stdout has gone
  143  the same as 130, by SIGTERM
"""

_COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "generate": (generate, "answer one question about images, or about none"),
    "batch": (batch, "answer the requests of a file, or the rows of a data set"),
    "plan": (plan, "say what a model takes and gives on devices that need not be there"),
    "models": (models, "list the architectures that can be served, and what they take"),
}
"""Name to its module and its summary; the module's docstring is its description."""


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
    for name, (module, summary) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=_EXIT_STATUS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # an option that is not given is not passed on
        )
        sub.set_defaults(command=module.run, usage_error=sub.error)
        sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        module.add_options(sub)
    return parser
