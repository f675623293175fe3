"""A unit while its part is not whole: which rows have their answer or their failure, kept in a journal.

A line of the journal is a row, answered or failed:

    {"row": 17, "prompt_tokens": 20, "completion_tokens": 5, "record": {...}}
    {"row": 18, "failure": {"row": 18, "custom_id": "x", "code": "invalid_media", "message": "..."}}

The record or failure comes last, so that it can be cut out of its line as it stands. Lines are in the order in which
rows came to their end. A run that was killed may leave a last line without its end, which is cut off; its row is
answered again.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aphrodite_jax.batch.answers import json_line
from aphrodite_jax.batch.output import OutputFile
from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.sources.base import Row, Unit

__all__ = ["OpenUnit", "SettledRow", "answered_row", "failed_row", "failure_of"]

_RECORD, _FAILURE, _END = b',"record":', b',"failure":', b"}\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettledRow:
    """A row that has come to its end, as its line in the journal."""

    number: int
    line: bytes
    answered: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


def answered_row(number: int, record: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> SettledRow:
    """A row with its answer's record."""
    tokens = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return SettledRow(
        number=number, line=json_line({"row": number, **tokens, "record": record}), answered=True, **tokens
    )


def failed_row(row: Row, refusal: Refusal) -> SettledRow:
    """A row with the reason why it has no answer."""
    failure = failure_of(row.number, row.custom_id, refusal.code, str(refusal))
    return SettledRow(number=row.number, line=json_line({"row": row.number, "failure": failure}), answered=False)


def failure_of(number: int | None, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """A line of the errors file; ``number`` is None for what is of no single row."""
    return {"row": number, "custom_id": custom_id, "code": code, "message": message}


class OpenUnit:
    """A unit that this run works on; other runs of this machine leave it alone until it is closed.

    Attributes:
      num_resumed: rows that the journal had when it was opened.
      num_answered, num_failed: rows by how they ended; the failure of the shard itself is one more.
    """

    def __init__(self, unit: Unit, file: OutputFile, close: Callable[[], None]):
        self.unit = unit
        self.close = close
        self._file = file
        # Where each row's line stands in the journal: 17 bytes a row.
        self._begin = np.full(unit.num_rows, -1, np.int64)
        self._end = np.zeros(unit.num_rows, np.int64)
        self._answered = np.zeros(unit.num_rows, bool)
        self.num_answered, self.num_failed = 0, int(unit.error is not None)
        self.prompt_tokens = self.completion_tokens = 0
        self._take_up()
        self.num_resumed = unit.num_rows - self.num_left

    @property
    def num_left(self) -> int:
        """Rows that have not come to their end."""
        return self.unit.num_rows - self.num_answered - self.num_failed + (self.unit.error is not None)

    def has(self, number: int) -> bool:
        """Whether a row has come to its end."""
        return bool(self._begin[number - self.unit.first_row] >= 0)

    def settled(self) -> Iterator[tuple[int, bool]]:
        """Rows that have come to their end, in the order of the input, and whether each was answered."""
        for place in np.flatnonzero(self._begin >= 0).tolist():
            yield self.unit.first_row + place, bool(self._answered[place])

    def append(self, rows: Sequence[SettledRow]) -> None:
        """Take in rows.

        Raises:
          BatchError: the disk is full, say; the journal is then as before.
        """
        begin = self._file.size
        self._file.append(b"".join(row.line for row in rows))
        for row in rows:
            self._count(row.number, begin, len(row.line), row.answered, row.prompt_tokens, row.completion_tokens)
            begin += len(row.line)

    def sync_if_due(self) -> None:
        """`sync` if the last one is a while ago; as it raises."""
        self._file.sync_if_due()

    def sync(self) -> None:
        """Have the disk keep the rows that were taken in.

        Raises:
          BatchError: the disk could not. Rows since the last sync are lost, and no more are taken in.
        """
        self._file.sync()

    def records(self) -> Iterator[bytes]:
        """Records of the answered rows, in the order of the input, as lines of JSON."""
        return self._values(self._answered, _RECORD)

    def failures(self) -> Iterator[bytes]:
        """Failures of rows, in the order of the input, then the shard's own, as lines of JSON."""
        yield from self._values(~self._answered & (self._begin >= 0), _FAILURE)
        if self.unit.error is not None:
            yield json_line(failure_of(None, None, "unreadable_shard", self.unit.error))

    def _values(self, chosen: np.ndarray, key: bytes) -> Iterator[bytes]:
        """What stands under the last key in the lines of some rows, with no time spent on parsing it."""
        for begin, end in zip(self._begin[chosen].tolist(), self._end[chosen].tolist(), strict=True):
            line = self._file.read(begin, end)
            yield line[line.index(key) + len(key) : -len(_END)] + b"\n"

    def _take_up(self) -> None:
        """Count what is there, and cut the journal off where something is not what a run writes."""
        begin = 0
        for data in self._file.lines():
            line = _decode(data)
            number = line.get("row") if line else None
            place = number - self.unit.first_row if isinstance(number, int) else -1
            if line is None or not 0 <= place < self.unit.num_rows or self._begin[place] >= 0:
                self._file.truncate(begin)
                return
            tokens = line.get("prompt_tokens", 0), line.get("completion_tokens", 0)
            self._count(self.unit.first_row + place, begin, len(data), "record" in line, *tokens)
            begin += len(data)

    def _count(self, number: int, begin: int, length: int, answered: bool, prompt: int, completion: int) -> None:
        place = number - self.unit.first_row
        self._begin[place], self._end[place], self._answered[place] = begin, begin + length, answered
        self.num_answered += answered
        self.num_failed += not answered
        self.prompt_tokens += prompt
        self.completion_tokens += completion


def _decode(data: bytes) -> dict[str, Any] | None:
    """The object of a whole line of a journal, or None if it is not what a run writes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or ("record" in value) == ("failure" in value):
        return None
    return value if next(reversed(value)) in ("record", "failure") and _is_as_written(value, data) else None


def _is_as_written(value: Any, data: bytes) -> bool:
    try:
        return json_line(value) == data
    except (ValueError, RecursionError):
        return False
