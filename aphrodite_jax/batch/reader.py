"""Rows of the units that a run takes, read in a thread ahead of the engine."""

import collections
import contextlib
import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Container, Iterator

from aphrodite_jax.batch.company import Company
from aphrodite_jax.batch.journal import OpenUnit
from aphrodite_jax.batch.output import OutputHeld
from aphrodite_jax.batch.parts import PartsJob
from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.sources import Row, Source, Unit
from aphrodite_jax.errors import BatchError

__all__ = ["Held", "ReadRow", "RowReader", "Taken"]

TOGETHER = 16
"""Rows that are handed over together, which costs threads less than one by one."""
MAX_OPEN_UNITS = 256
"""Units that are worked on at a time: each has an open file."""
CLOSES_WITHIN = 2.0
"""Seconds that a read which was begun may take when no more rows are wanted."""
PAUSES = (1.0, 4.0)
"""Seconds before a unit is read again that the system refused to read."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """A unit that this run works on from now; its rows follow."""

    work: OpenUnit


@dataclasses.dataclass(frozen=True)
class Held:
    """A unit that another run works on."""

    unit: Unit


@dataclasses.dataclass(frozen=True)
class ReadRow:
    """A row that has not come to its end yet."""

    work: OpenUnit
    row: Row


@dataclasses.dataclass(frozen=True)
class _End:
    """Nothing follows."""


_Item = Taken | Held | ReadRow | Exception | _End


class RowReader:
    """Reads the rows of units that are not done, in the order of the input.

    Args:
      job: whose units are taken.
      company: takes them.
      indices: of the units; None is all.
      done: units that are whole.
      ahead: rows that are read and not taken over, at most.
    """

    def __init__(
        self, job: PartsJob, company: Company, indices: Container[int] | None, done: Container[int], ahead: int
    ):
        self._job, self._company, self._indices, self._done = job, company, indices, done
        self._queue: queue.Queue[list[_Item]] = queue.Queue(max(2, ahead // TOGETHER))
        self._taken_over: collections.deque[_Item] = collections.deque()  # of the latest ones, those that are left
        # In company all would wait for a place, and nobody for what gives one back.
        self._places = threading.Semaphore(MAX_OPEN_UNITS if company.is_alone else sys.maxsize)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read rows", daemon=True)
        self.is_exhausted = False
        self._thread.start()

    def get(self, timeout: float | None = None) -> Taken | Held | ReadRow | None:
        """What comes next; None if nothing has come in ``timeout`` seconds, or nothing will (`is_exhausted`).

        Raises:
          BatchError: the input or the output can't be used, and others as `Source.rows` raises them.
        """
        if not self._taken_over and not self.is_exhausted:
            with contextlib.suppress(queue.Empty):
                self._taken_over.extend(self._queue.get(block=timeout is not None, timeout=timeout))
        if not self._taken_over:
            return None
        item = self._taken_over.popleft()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, _End):
            self.is_exhausted = True
            return None
        return item

    def release(self) -> None:
        """Tell that a unit was closed."""
        self._places.release()

    def close(self) -> list[OpenUnit]:
        """Stop reading; the units that were taken and not taken over.

        A read that takes longer than `CLOSES_WITHIN` is left to itself: it takes no unit any more.
        """
        self._closing.set()
        items, until = list(self._taken_over), time.monotonic() + CLOSES_WITHIN
        while (self._thread.is_alive() and time.monotonic() < until) or not self._queue.empty():
            with contextlib.suppress(queue.Empty):
                items += self._queue.get(timeout=0.01)
        self.is_exhausted = True
        return [item.work for item in items if isinstance(item, Taken)]

    def _run(self) -> None:
        """Hand over what is read: one by one where it is waited for, and else some together."""
        items: list[_Item] = []
        try:
            for item in self._items():
                if item is not None:
                    items.append(item)
                if item is None or len(items) == TOGETHER or self._queue.empty():
                    self._put(items)
                    items = []
            items.append(_End())
        except Exception as error:  # raised where rows are taken over
            items.append(error)
        self._put(items)

    def _put(self, items: list["_Item"]) -> None:
        """Hand over, unless nobody wants rows any more; a unit is always handed over: somebody must close it."""
        while items and (not self._closing.is_set() or any(isinstance(item, Taken) for item in items)):
            with contextlib.suppress(queue.Full):
                self._queue.put(items, timeout=0.05)
                return

    def _items(self) -> Iterator[Taken | Held | ReadRow | None]:
        """What is handed over; None in front of what may take long for want of what was read."""
        for unit in self._job.units(self._indices):
            if unit.index in self._done:
                continue
            while not self._places.acquire(timeout=0.05):
                yield None
                if self._closing.is_set():
                    return
            if self._closing.is_set():
                return
            try:
                work = self._company.take(unit, self._closing)
            except OutputHeld:
                self._places.release()
                yield Held(unit)
                continue
            if work is None:  # another run has made it whole meanwhile
                self._places.release()
                yield Held(unit)
                continue
            yield Taken(work)
            if work.num_left:
                for row in _rows(self._job.source, unit, self._closing):
                    if self._closing.is_set():
                        return
                    if not work.has(row.number):
                        yield ReadRow(work, row)


def _rows(source: Source, unit: Unit, closing: threading.Event) -> Iterator[Row]:
    """The rows of a unit; what can't be read after some tries becomes failures.

    Raises:
      BatchError: the input has other rows there than when the job was made.
    """
    number, pauses = unit.first_row, iter(PAUSES)
    while True:
        try:
            for row in source.rows(unit):
                if row.number == number:  # not one that came before at an earlier try
                    number += 1
                    yield row
            break
        except BatchError:
            raise
        except Exception as error:
            pause = next(pauses, None) if isinstance(error, OSError) else None
            if pause is not None and not closing.wait(pause):
                continue
            if closing.is_set():  # not to be taken for a shard that can't be read
                return
            refusal = Refusal(f"the shard can't be read: {type(error).__name__}: {error}", code="unreadable_shard")
            for left in range(number, unit.first_row + unit.num_rows):
                yield Row(number=left, custom_id=None, request=refusal)
            return
    if number != unit.first_row + unit.num_rows:
        raise BatchError(
            f"the input {source.path!r} is not as it was when the job was made: part {unit.index} had {unit.num_rows} "
            f"rows, and has {number - unit.first_row}; put it back, or start again with another output"
        )
