"""The input file as a stream of lines: it is never held in memory as a whole."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MAX_LINE_BYTES", "InputSummary", "Line", "read_lines", "scan_input"]

MAX_LINE_BYTES = 256 * 2**20
"""Longest line that is read whole, in bytes; a longer one is refused without being held in memory."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input that is not blank; ``number`` counts all lines from 1.

    ``data`` is its bytes, or None for a line longer than the limit.
    """

    number: int
    data: bytes | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSummary:
    """What identifies an input: SHA-256 and bytes of the whole, and how many lines are not blank."""

    sha256: str
    num_bytes: int
    num_lines: int


def read_lines(path: str | Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of ``path`` that are not blank, one at a time; a byte-order mark at the start is dropped."""
    with open(path, "rb") as file:
        number = 0
        while data := file.readline(max_line_bytes + 1):
            number += 1
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if len(data) > max_line_bytes and not data.endswith(b"\n"):
                while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                    pass
                yield Line(number, None)
            elif data.strip():
                yield Line(number, data)


def scan_input(path: str | Path) -> InputSummary:
    """Read ``path`` once for its identity and its number of lines."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = file.tell()
    return InputSummary(sha256=digest, num_bytes=num_bytes, num_lines=sum(1 for _ in read_lines(path)))
