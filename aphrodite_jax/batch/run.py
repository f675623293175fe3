"""Requests through the engine, answers to the output in the order of the input.

A program computes a row of its batch to the last bit as before only if the batch has the same shape, and the
shape depends on what else runs. So lines go to the engine in groups that are cut by their place in the input
alone, and each group starts with an idle engine. A run that takes up a job runs the group again in which the
earlier one ended, and leaves out the lines that are written: the steps, and so the answers, are those of an
undisturbed run.
"""

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import tqdm

from aphrodite_jax.batch.answers import OutputLine, answer_line, refusal_line, refusal_of_output
from aphrodite_jax.batch.job import BatchReport, Job, open_job
from aphrodite_jax.batch.lines import Line, read_lines
from aphrodite_jax.batch.refusal import Refusal, refusal_of
from aphrodite_jax.batch.requests import BatchRequest, custom_id_of, decode_line, parse_request, prompt_of
from aphrodite_jax.engine.sequence import PreparedPrompt
from aphrodite_jax.errors import BatchError
from aphrodite_jax.executor.model_runner import MAX_DECODE_STEPS
from aphrodite_jax.outputs import RequestOutput

if TYPE_CHECKING:
    from aphrodite_jax.llm import LLM

__all__ = ["answer_job", "run_batch"]

GROUP_ROUNDS = 8
"""Lines of a group for each request that runs at a time: more keep the engine fuller, fewer run again."""


def run_batch(
    llm: "LLM",
    input_path: str | Path,
    output_path: str | Path,
    *,
    max_tokens: int | None = None,
    served_model_names: tuple[str, ...] = (),
    show_progress: bool = True,
) -> BatchReport:
    """Answer an OpenAI batch file, or what an earlier run of the same job left unanswered.

    Each line gets one line in the output, in the same order: its answer, or the error of that line alone. A
    run that is stopped at any moment and started again, with the same options on the same machine, ends with
    the same bytes as one that is not. Arguments as for `open_job`.

    Raises:
      BatchError: the input, or the output, can't be used (see `open_job`), or the disk is full; what is in
        the output stays, and the same call goes on from there.
    """
    with open_job(
        input_path,
        output_path,
        model_config=llm.model_config,
        max_tokens=max_tokens,
        served_model_names=served_model_names,
    ) as job:
        return answer_job(llm, job, show_progress=show_progress)


def answer_job(llm: "LLM", job: Job, *, show_progress: bool = True) -> BatchReport:
    """Answer the rest of an open job.

    Requests go to the engine as others finish, twice as many as it runs at a time, in the order of the input; as many
    more are prepared meanwhile.

    Raises:
      BatchError: the output can't be written, the input changed while it was read, or the engine has other
        requests.
    """
    if job.is_complete:
        return job.report()
    if llm.engine.has_unfinished_requests():
        raise BatchError("the engine has other requests; finish or abort them before a batch")
    num_written = len(job.resumed_ids)
    size = GROUP_ROUNDS * llm.engine.engine_config.max_num_seqs
    start = num_written // size * size  # the group in which the earlier run ended
    custom_ids = set(job.resumed_ids[:start])
    lines = itertools.islice(read_lines(job.input_path), start, None)
    bar = tqdm.tqdm(
        total=job.summary.num_lines,
        initial=num_written,
        unit="line",
        file=sys.stderr,
        disable=not show_progress,
        # A bar that is not looked at, but kept in a log, says less.
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
    skip = num_written - start
    with bar:
        for _ in range(start, job.summary.num_lines, size):
            group = _Group(llm, job, custom_ids)
            for output_lines in group.run(itertools.islice(lines, size)):
                new, skip = output_lines[skip:], max(0, skip - len(output_lines))
                if new:
                    job.append(new)
                    bar.update(len(new))
                job.output.sync_if_due()
    job.output.sync()
    if not job.is_complete:
        raise BatchError(f"the input {job.input_path!r} changed while it was read; start again with another output")
    return job.report()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Taken:
    """A request whose prompt is being prepared."""

    number: int
    request: BatchRequest
    prompt: Future[PreparedPrompt]


class _Group:
    """Lines that run from an idle engine to an idle engine.

    ``ahead`` are requests whose prompts are being prepared, which threads do; they start in the order of the input and
    each is waited for, so that threads don't decide what a step holds. ``turn`` holds the numbers of the lines that
    were taken and not yet given out, first to last; ``ready`` the output lines of some of them.
    """

    def __init__(self, llm: "LLM", job: Job, custom_ids: set[str | None]):
        self.llm, self.job, self.custom_ids = llm, job, custom_ids
        self.ahead: collections.deque[_Taken] = collections.deque()
        self.in_flight: dict[str, tuple[int, BatchRequest]] = {}
        self.turn: collections.deque[int] = collections.deque()
        self.ready: dict[int, OutputLine] = {}

    def run(self, lines: Iterator[Line]) -> Iterator[list[OutputLine]]:
        """The output lines of ``lines``, in their order, as they are ready."""
        engine = self.llm.engine
        engine.reset_caches()
        window = 2 * engine.engine_config.max_num_seqs
        try:
            while True:
                self.take(lines, 2 * window)
                while self.ahead and len(self.in_flight) < window:
                    self.start(self.ahead.popleft())
                    self.take(lines, 2 * window)
                yield self.finished()
                if self.in_flight:
                    if not engine.has_unfinished_requests():
                        raise RuntimeError(f"the engine has lost {', '.join(self.in_flight)}")
                    self.collect(engine.step(MAX_DECODE_STEPS))
                elif not self.ahead:
                    return
        finally:
            for taken in self.ahead:
                taken.prompt.cancel()
            for request_id in self.in_flight:
                engine.abort_request(request_id)

    def take(self, lines: Iterator[Line], count: int) -> None:
        """Take lines until ``count`` are on their way, and begin to prepare them."""
        while len(self.in_flight) + len(self.ahead) < count and (line := next(lines, None)) is not None:
            self.turn.append(line.number)
            self.prepare(line)

    def prepare(self, line: Line) -> None:
        """Begin to prepare a line's prompt, or make its error its output."""
        custom_id = None
        try:
            value = decode_line(line)
            custom_id = custom_id_of(value)
            if custom_id in self.custom_ids:
                raise Refusal("custom_id was used by an earlier line", code="duplicate_custom_id", param="custom_id")
            self.custom_ids.add(custom_id)
            request = parse_request(value, self.job.defaults)
            make = self.llm.render_chat if request.kind == "chat" else prompt_of
            prompt = self.llm.prepare_later(functools.partial(make, request.source))
        except Exception as error:  # what a line's content brings about is that line's error, and written
            self.ready[line.number] = refusal_line(line.number, custom_id, refusal_of(error))
        else:
            self.ahead.append(_Taken(number=line.number, request=request, prompt=prompt))

    def start(self, taken: _Taken) -> None:
        """Hand a request to the engine, or make its error its output."""
        number, request, request_id = taken.number, taken.request, f"batch-{taken.number}"
        try:
            prompt = taken.prompt.result()
            self.llm.engine.add_prepared(request_id, prompt, request.sampling_params, incremental=False)
        except Exception as error:
            self.ready[number] = refusal_line(number, request.custom_id, refusal_of(error))
        else:
            self.in_flight[request_id] = (number, request)

    def collect(self, outputs: Iterable[RequestOutput]) -> None:
        """Make output lines of the requests that are finished."""
        for output in outputs:
            if output.finished:
                number, request = self.in_flight.pop(output.request_id)
                refusal = refusal_of_output(output)
                self.ready[number] = (
                    answer_line(number, request, output)
                    if refusal is None
                    else refusal_line(number, request.custom_id, refusal)
                )

    def finished(self) -> list[OutputLine]:
        """The ready lines that no unfinished one stands before; each is given out once."""
        lines = []
        while self.turn and self.turn[0] in self.ready:
            lines.append(self.ready.pop(self.turn.popleft()))
        return lines
