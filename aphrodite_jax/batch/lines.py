"""The input file as a stream of lines: it is never held in memory as a whole."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["MAX_LINE_BYTES", "InputSummary", "Line", "read_lines", "read_lines_from", "scan_input"]

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
        for line, _ in read_lines_from(file, max_line_bytes=max_line_bytes):
            yield line


def read_lines_from(
    file: BinaryIO, begin: int = 0, end: int | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[Line, int]]:
    """Lines of an open file that are not blank, each with the byte offset behind it; numbers count from ``begin``.

    Args:
      begin, end: byte offsets of whole lines; those from ``begin`` up to ``end`` are read, all if it is None.
    """
    file.seek(begin)
    offset, number = begin, 0
    while (end is None or offset < end) and (data := file.readline(max_line_bytes + 1)):
        start, number = offset, number + 1
        offset += len(data)
        if start == 0:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if len(data) > max_line_bytes and not data.endswith(b"\n"):
            while rest := file.readline(2**20):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield Line(number, None), offset
        elif data.strip():
            yield Line(number, data), offset


def scan_input(path: str | Path) -> InputSummary:
    """Read ``path`` once for its identity and its number of lines."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = file.tell()
    return InputSummary(sha256=digest, num_bytes=num_bytes, num_lines=sum(1 for _ in read_lines(path)))
