"""Rows of a job's parts through the engine.

Rows of successive units flow into one engine without a gap. Threads prepare prompts ahead of the device; those that
are ready make a window, whose prompts go to the engine sorted by shape while the next are prepared. What came to its
end is written while the device runs on: a thread of its own adds it to the journals of the units, and puts units in
place that have no rows left.

Processes that serve one model together (`batch.company`) do all this alike: what hangs on threads they wait for.
"""

import collections
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

from aphrodite_jax.batch.answers import refusal_of_output
from aphrodite_jax.batch.company import LEAVE, STOP, Company
from aphrodite_jax.batch.journal import OpenUnit, SettledRow, answered_row, failed_row
from aphrodite_jax.batch.parts import PartsJob, PartsReport, Standing
from aphrodite_jax.batch.progress import Progress
from aphrodite_jax.batch.prompts import PromptMaker
from aphrodite_jax.batch.reader import Held, ReadRow, RowReader, Taken
from aphrodite_jax.batch.refusal import Refusal, refusal_of
from aphrodite_jax.batch.requests import BatchRequest
from aphrodite_jax.batch.sources import Row
from aphrodite_jax.batch.window import num_bytes, sorted_by_shape
from aphrodite_jax.engine.sequence import PreparedPrompt
from aphrodite_jax.errors import BatchError
from aphrodite_jax.executor.model_runner import MAX_DECODE_STEPS
from aphrodite_jax.outputs import RequestOutput

if TYPE_CHECKING:
    from aphrodite_jax.llm import LLM

__all__ = ["Stop", "run_parts"]

WINDOW_ROUNDS = 4
"""Prompts of a window for each request that runs at a time."""
WINDOW_BYTES = 512 * 2**20
"""Bytes of media that prepared prompts may hold in all, but for those of the requests that one step can take."""
STOPS_WITHIN = 25.0
"""Seconds for rows that run when the run is told to stop."""
WRITTEN_EVERY = 0.1
"""Seconds that an answer may wait for others: they go to the writing thread together, which wakes less often."""
WRITES_AHEAD = 64
"""Groups of rows that may wait for being written."""
_POLL = 0.05


class Stop(Protocol):
    """Tells a run to stop: a `threading.Event`, say."""

    def is_set(self) -> bool:
        """Whether it should."""
        ...


def run_parts(
    llm: "LLM",
    job: PartsJob,
    indices: Iterable[int] | None = None,
    *,
    stop: Stop | None = None,
    max_failures: int | None = None,
    show_progress: bool = True,
) -> PartsReport:
    """Answer the rows of a job's parts that have no answer yet.

    Parts that another run of this machine works on are left to it.

    Args:
      indices: of the parts; None takes all. ``range(i, job.num_units, n)`` is the share of worker ``i`` of ``n``.
      stop: is asked between steps; once it is set no new rows begin, and those that run have 25 seconds.
      max_failures: rows of these parts that may fail; one more stops the run.
      show_progress: draw a line on stderr.

    Raises:
      BatchError: too many rows failed, the output can't be written, the input is not what it was, or the engine has
        other requests. What is in the output stays, and the next run goes on from there.
    """
    if llm.engine.has_unfinished_requests():
        raise BatchError("the engine has other requests; finish or abort them before a batch")
    chosen = indices if indices is None or isinstance(indices, range) else frozenset(indices)
    if chosen and not (min(chosen) >= 0 and max(chosen) < job.num_units):
        raise BatchError(f"the job has the parts 0 to {job.num_units - 1}, asked were {min(chosen)} to {max(chosen)}")
    company = Company(job, llm.engine.lockstep)
    standing = company.standing(chosen)
    if company.leads and not standing.is_complete:
        job.reopen()
    with Progress(standing, show=show_progress and company.leads) as progress:
        run = _Run(llm, job, company, chosen, standing, stop or threading.Event(), max_failures, progress)
        run.run()
    return run.report()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pending:
    """A row on its way; its request is without its source once the prompt is being prepared."""

    work: OpenUnit
    row: Row
    request: BatchRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ended:
    """A row that came to its end: its answer, or why it has none."""

    work: OpenUnit
    row: Row
    end: RequestOutput | Refusal


@dataclasses.dataclass(kw_only=True)
class _Written:
    """What was written of some rows: their figures, and units that are in their place now."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    units: list[int] = dataclasses.field(default_factory=list)


class _Run:
    """One run.

    Attributes:
      preparing: rows whose prompts are being prepared, in the order of the input.
      window: rows that are ready for the engine, in the order in which they go there.
      in_flight: rows in the engine, by request id.
      ended: rows that came to their end and were not given to the writing thread yet.
      writing: what that thread has to do, the oldest first.
    """

    def __init__(
        self,
        llm: "LLM",
        job: PartsJob,
        company: Company,
        indices: Container[int] | None,
        standing: Standing,
        stop: Stop,
        max_failures: int | None,
        progress: Progress,
    ):
        self.llm, self.job, self.indices, self.stop, self.progress = llm, job, indices, stop, progress
        self.company = company
        self.max_seqs = llm.engine.max_running
        self.window_rows = WINDOW_ROUNDS * self.max_seqs
        self.make_prompt = PromptMaker(llm)
        self.reader = RowReader(job, company, indices, frozenset(standing.done), 2 * self.window_rows)
        self.preparing: collections.deque[tuple[_Pending, Future[PreparedPrompt]]] = collections.deque()
        self.window: collections.deque[tuple[PreparedPrompt, _Pending]] = collections.deque()
        self.in_flight: dict[str, _Pending] = {}
        self.ended: list[_Ended] = []
        self.written_at = -WRITTEN_EVERY
        self.open: dict[int, OpenUnit] = {}
        self.held: set[int] = set()
        self.writer = ThreadPoolExecutor(1, "write rows")
        self.writing: collections.deque[Future[_Written]] = collections.deque()
        self.standing, self.max_failures = standing, max_failures
        self.num_failed, self.last_failure = standing.failed, "it was so when the run began"
        self.num_resumed = standing.done_rows
        self.num_rows = self.prompt_tokens = self.completion_tokens = 0
        self.mean_bytes = 0.0  # of a prepared prompt's media
        self.deadline: float | None = None
        self.began = time.monotonic()
        self.answered_of_open = self.failed_of_open = 0

    # The loop.

    def run(self) -> None:
        """Until nothing is left, or it is told to stop."""
        try:
            while self._step():
                pass
            self._write_later()
            self._take_notice(0)
        finally:
            self._close()

    def _step(self) -> bool:
        """Move everything on by a step of the engine; False at the end."""
        if self.stop.is_set():
            self.company.ask(STOP)
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.company.ask(LEAVE)
        if self.company.asked == LEAVE:
            return False
        if self.company.asked == STOP and self.deadline is None:
            self._begin_to_stop()
        if self.deadline is None:
            self._prepare()
            self._hand_over()
        if not self.in_flight or time.monotonic() > self.written_at + WRITTEN_EVERY:
            self._write_later()
        self._check_failures()
        self._take_notice(WRITES_AHEAD)
        if self.in_flight:
            if not self.llm.engine.has_unfinished_requests():
                raise RuntimeError(f"the engine has lost {', '.join(self.in_flight)}")
            more = self.preparing or self.window or not self.reader.is_exhausted
            # Who could join the next step waits no longer for several of decode.
            joins = more and self.deadline is None and len(self.in_flight) < self.max_seqs
            self._collect(self.llm.engine.step(1 if joins else MAX_DECODE_STEPS))
            return True
        if self.deadline is not None:
            return False
        if self.preparing:
            wait([self.preparing[0][1]], timeout=_POLL, return_when=FIRST_COMPLETED)
            return True
        if not self.reader.is_exhausted:
            self._take_over(self.reader.get(timeout=_POLL))
            return True
        return False

    def _begin_to_stop(self) -> None:
        self.deadline = time.monotonic() + STOPS_WITHIN
        for _, prompt in self.preparing:
            prompt.cancel()
        self.preparing.clear()
        self.window.clear()

    # Rows in.

    def _prepare(self) -> None:
        """Take rows over until enough prompts are being prepared."""
        fits = int(WINDOW_BYTES / self.mean_bytes) if self.mean_bytes else self.window_rows
        # As the window goes to the engine the next one is prepared, evenly: threads take their time from the engine.
        rows = max(self.max_seqs, min(self.window_rows, fits) - len(self.window))
        while len(self.preparing) < rows and (item := self._next()) is not None:
            self._take_over(item)

    def _next(self) -> Taken | Held | ReadRow | None:
        """What the reader has; in company, what it will have."""
        item = self.reader.get()
        while item is None and not (self.company.is_alone or self.reader.is_exhausted):
            item = self.reader.get(timeout=_POLL)
        return item

    def _take_over(self, item: Taken | Held | ReadRow | None) -> None:
        if isinstance(item, Held):
            self.held.add(item.unit.index)
        elif isinstance(item, Taken):
            work = item.work
            self.open[work.unit.index] = work
            self.num_resumed += work.num_resumed
            self.num_failed += work.num_failed
            self.progress.add(work.num_resumed, failed=work.num_failed, resumed=True)
            self._check_failures()
            if not work.num_left:
                self.writing.append(self.writer.submit(self._put_in_place, work, _Written()))
        elif isinstance(item, ReadRow):
            self._prepare_row(item.work, item.row)

    def _prepare_row(self, work: OpenUnit, row: Row) -> None:
        if isinstance(row.request, Refusal):
            self._end(_Ended(work=work, row=row, end=row.request))
            return
        prompt = self.llm.prepare_later(functools.partial(self.make_prompt, row.request))
        request = dataclasses.replace(row.request, source=None)  # which may be large
        pending = _Pending(work=work, row=dataclasses.replace(row, request=request), request=request)
        self.preparing.append((pending, prompt))

    def _hand_over(self) -> None:
        """Give the engine twice as many requests as it runs at a time."""
        while len(self.in_flight) < 2 * self.max_seqs:
            if not self.window:
                self._make_window()
            if not self.window:
                return
            prompt, pending = self.window.popleft()
            request_id = f"row-{pending.row.number}"
            try:
                self.llm.engine.add_prepared(request_id, prompt, pending.request.sampling_params, incremental=False)
            except Exception as error:  # what a row brings about is that row's failure, and written
                self._end(_Ended(work=pending.work, row=pending.row, end=refusal_of(error)))
            else:
                self.in_flight[request_id] = pending

    def _make_window(self) -> None:
        """Make a window of the first rows whose prompts are ready; in company, of the first ones."""
        ready = []
        while self.preparing and self._is_of_window(len(ready), self.preparing[0][1]):
            pending, prompt = self.preparing.popleft()
            try:
                ready.append((prompt.result(), pending))
            except Exception as error:
                self._end(_Ended(work=pending.work, row=pending.row, end=refusal_of(error)))
        for prompt, _ in ready:
            self.mean_bytes += (num_bytes(prompt) - self.mean_bytes) / self.window_rows
        self.window.extend(sorted_by_shape(ready))

    def _is_of_window(self, number: int, prompt: Future[PreparedPrompt]) -> bool:
        return prompt.done() if self.company.is_alone else number < self.max_seqs

    # Rows out.

    def _collect(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            if output.finished:
                pending = self.in_flight.pop(output.request_id)
                self._end(_Ended(work=pending.work, row=pending.row, end=refusal_of_output(output) or output))

    def _end(self, ended: _Ended) -> None:
        self.ended.append(ended)
        if isinstance(ended.end, Refusal):
            self.num_failed += 1
            self.last_failure = f"the last one: row {ended.row.number}, {ended.end}"

    def _write_later(self) -> None:
        """Give rows that came to their end to the writing thread."""
        if self.ended:
            ended, self.ended = self.ended, []
            self.writing.append(self.writer.submit(self._write, ended))
            self.written_at = time.monotonic()

    def _write(self, ended: Sequence[_Ended]) -> _Written:
        """Add rows to the journals of their units, in the writing thread."""
        written, by_unit = _Written(rows=len(ended)), {}
        for one in ended:
            row = self._settled(one)
            by_unit.setdefault(one.work.unit.index, (one.work, []))[1].append(row)
            written.prompt_tokens += row.prompt_tokens
            written.completion_tokens += row.completion_tokens
            if not row.answered:
                written.failed += 1
        for work, rows in by_unit.values():
            work.append(rows)
            if not work.num_left:
                self._put_in_place(work, written)
        for work in list(self.open.values()):
            work.sync_if_due()
        return written

    def _settled(self, ended: _Ended) -> SettledRow:
        if isinstance(ended.end, Refusal):
            return failed_row(ended.row, ended.end)
        num_prompt = len(ended.end.prompt_token_ids)
        num_completion = sum(len(answer.token_ids) for answer in ended.end.outputs)
        record = self.job.source.record(ended.row, ended.end)
        return answered_row(ended.row.number, record, num_prompt, num_completion)

    def _put_in_place(self, work: OpenUnit, written: _Written) -> _Written:
        """Put a unit without rows left in its place, in the writing thread."""
        del self.open[work.unit.index]
        self.company.put_in_place(work)
        written.units.append(work.unit.index)
        return written

    def _take_notice(self, at_most: int) -> None:
        """Count what was written, and wait while more than ``at_most`` steps are not."""
        while self.writing and (len(self.writing) > at_most or self.writing[0].done()):
            written = self.writing.popleft().result()
            self.num_rows += written.rows
            self.prompt_tokens += written.prompt_tokens
            self.completion_tokens += written.completion_tokens
            self.progress.add(written.rows, failed=written.failed, tokens=written.completion_tokens)
            for _ in written.units:
                self.reader.release()

    def _check_failures(self) -> None:
        if self.max_failures is not None and self.num_failed > self.max_failures:
            raise BatchError(
                f"{self.num_failed} rows failed, more than max_failures {self.max_failures} allows "
                f"({self.last_failure}); what is in {self.job.place!r} stays, and the same job goes on from there with "
                "a higher limit"
            )

    def _close(self) -> None:
        """Abort what runs, and close what is open."""
        for _, prompt in self.preparing:
            prompt.cancel()
        for request_id in self.in_flight:
            self.llm.engine.abort_request(request_id)
        self._write_later()
        self.writer.shutdown()
        with contextlib.ExitStack() as closing:
            for work in [*self.open.values(), *self.reader.close()]:
                self.answered_of_open += work.num_answered
                self.failed_of_open += work.num_failed
                closing.callback(self.company.keep, work)
                closing.callback(work.sync)
        self.seconds = time.monotonic() - self.began

    def report(self) -> PartsReport:
        """What the run did; once it has ended."""
        standing = self.job.standing(self.indices)
        return PartsReport(
            parts=standing.parts,
            rows=standing.rows,
            answered=standing.answered + self.answered_of_open,
            failed=standing.failed + self.failed_of_open,
            resumed=self.num_resumed,
            held=len(self.held - standing.done),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            seconds=round(self.seconds, 3),
            rows_per_second=round(self.num_rows / self.seconds, 2),
            tokens_per_second=round(self.completion_tokens / self.seconds, 2),
            stopped=self.deadline is not None,
        )
