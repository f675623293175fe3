"""A job: an input, an output, and what the answers depend on; and how far it has come.

Beside ``answers.jsonl`` stands ``answers.jsonl.job.json``, which says whose answers these are: the digest of
the input, the model, and the options that an answer depends on. A job is taken up again if all of that is
equal, and is refused otherwise. How the engine runs is not part of it, so that a job that was too large for
the memory can go on with fewer requests at a time.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aphrodite_jax.batch.answers import OutputLine, line_id
from aphrodite_jax.batch.identity import differences, model_identity, model_names
from aphrodite_jax.batch.lines import InputSummary, read_lines, scan_input
from aphrodite_jax.batch.output import OutputFile, open_output, replace_file
from aphrodite_jax.batch.requests import Defaults
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import BatchError

__all__ = ["BatchReport", "Job", "open_job"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What stands in the output: lines that are answered, lines with an error, and those of earlier runs."""

    num_lines: int
    num_answered: int
    num_failed: int
    num_resumed: int


@dataclasses.dataclass(kw_only=True)
class Job:
    """A job whose output is open.

    Attributes:
      resumed_ids: the ``custom_id`` of each line that earlier runs left in the output; None for a line without.
      num_answered, num_failed: lines of the output, by what they hold.
    """

    input_path: str
    summary: InputSummary
    output: OutputFile
    defaults: Defaults
    resumed_ids: list[str | None] = dataclasses.field(default_factory=list)
    num_answered: int = 0
    num_failed: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether every line has its answer."""
        return self.num_answered + self.num_failed == self.summary.num_lines

    def append(self, lines: Sequence[OutputLine]) -> None:
        """Write the next output lines, in the order of the input.

        Raises:
          BatchError: the disk is full, say; none of them is in the output then.
        """
        self.output.append(b"".join(line.data for line in lines))
        num_answered = sum(line.answered for line in lines)
        self.num_answered += num_answered
        self.num_failed += len(lines) - num_answered

    def report(self) -> BatchReport:
        """How the job stands."""
        return BatchReport(
            num_lines=self.summary.num_lines,
            num_answered=self.num_answered,
            num_failed=self.num_failed,
            num_resumed=len(self.resumed_ids),
        )


@contextlib.contextmanager
def open_job(
    input_path: str | Path,
    output_path: str | Path,
    *,
    model_config: ModelConfig,
    max_tokens: int | None = None,
    served_model_names: tuple[str, ...] = (),
) -> Iterator[Job]:
    """Open a job anew, or where an earlier run of it ended; no model is loaded for it.

    Args:
      input_path: requests in the OpenAI batch format, a regular file.
      output_path: where the answers go, in the order of the input.
      model_config: the model that will answer.
      max_tokens: generated tokens for lines that don't say; None leaves it to the model's limit for a chat,
        to 16 for a completion.
      served_model_names: names under which lines may ask for the model, beside its own.

    Raises:
      BatchError: the input can't be read; the output can't be written, is the input, is open in another run,
        or holds something that is not this job's. Nothing is overwritten then.
    """
    source, target = os.path.realpath(input_path), os.path.realpath(output_path)
    sidecar = f"{target}.job.json"
    try:
        if not os.path.isfile(source):
            raise BatchError(f"the input {str(input_path)!r} is not a file; a job is read from a regular file")
        summary = scan_input(source)
    except OSError as error:
        raise BatchError(f"can't read the input {str(input_path)!r}: {error.strerror}") from error
    for path in (target, sidecar):
        if os.path.exists(path) and os.path.samefile(path, source):
            raise BatchError(f"the output {str(output_path)!r} would overwrite the input; give another output")
    names = model_names(model_config, served_model_names)
    identity = {
        "format": _FORMAT,
        "input": {"sha256": summary.sha256, "bytes": summary.num_bytes},
        "model": model_identity(model_config),
        "options": {"max_tokens": max_tokens, "name": names[0], "served_model_names": list(served_model_names)},
    }
    defaults = Defaults(
        model_names=names,
        context_length=model_config.context_length,
        max_tokens=max_tokens,
        seed=model_config.seed,
    )
    with open_output(target) as output:
        try:
            _claim(output, sidecar, identity)
            job = Job(input_path=source, summary=summary, output=output, defaults=defaults)
            _take_up(job)
            yield job
            output.sync()
        finally:
            _remove_if_nothing_came(output, sidecar, summary)


def _claim(output: OutputFile, sidecar: str, identity: dict[str, Any]) -> None:
    """Make sure that the output is this job's, or empty and made this job's."""
    try:
        with open(sidecar, "rb") as file:
            found = json.loads(file.read())
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise BatchError(f"can't read {sidecar!r}, which says whose answers these are: {error}") from error
    if found == identity:
        return
    if output.size:
        reason = (
            f"there is no {os.path.basename(sidecar)!r} beside it"
            if found is None
            else f"it differs in {', '.join(differences(found, identity))}"
        )
        raise BatchError(
            f"the output {output.path!r} holds something that is not of this job ({reason}); move it away, "
            "or give another output"
        )
    replace_file(sidecar, json.dumps(identity, indent=2, sort_keys=True).encode() + b"\n")


def _take_up(job: Job) -> None:
    """Count the answers that are there, and cut off a last line whose end was not written."""
    size, requests = 0, read_lines(job.input_path)
    for number, data in enumerate(job.output.lines(), start=1):
        if not data.endswith(b"\n"):
            job.output.truncate(size)
            return
        line, value = next(requests, None), _decode(data)
        if value is None or line is None or value.get("id") != line_id(line.number):
            raise BatchError(
                f"line {number} of the output {job.output.path!r} is not what this job wrote there; move the "
                f"file away, or keep its first {number - 1} lines only to go on from them"
            )
        size += len(data)
        job.resumed_ids.append(value.get("custom_id"))
        if value.get("error") is None:
            job.num_answered += 1
        else:
            job.num_failed += 1


def _decode(data: bytes) -> dict[str, Any] | None:
    """The object of an output line, or None if it holds none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _remove_if_nothing_came(output: OutputFile, sidecar: str, summary: InputSummary) -> None:
    """Leave no empty file behind where the model could not be loaded, say."""
    if output.created and output.size == 0 and summary.num_lines:
        for path in (sidecar, output.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
