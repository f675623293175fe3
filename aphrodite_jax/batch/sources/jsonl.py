"""OpenAI batch files: one file, or several by a pattern or in a folder.

A unit is a run of lines of one file, found again by its byte offsets. Lines that are blank are no rows. The input is
read through once when the job is made, for where units begin and for names that are used twice.
"""

import array
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from aphrodite_jax.batch.answers import answer_value
from aphrodite_jax.batch.lines import Line, read_lines_from
from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.requests import BatchRequest, custom_id_of, decode_line, parse_request
from aphrodite_jax.batch.sources.base import Row, RowOptions, Source, Unit
from aphrodite_jax.batch.sources.files import NOT_TO_BE_HAD, InputFile, find_files, look_again
from aphrodite_jax.batch.sources.shards import reason_of
from aphrodite_jax.errors import BatchError
from aphrodite_jax.outputs import RequestOutput

__all__ = ["JsonlSource"]

_SAMPLED_BYTES = 2**16
"""Read at either end of each file for its identity; what is between is checked before rows are given."""


class JsonlSource(Source):
    """Requests in the OpenAI batch format; parts are lines of its output format.

    Raises:
      BatchError: there is no such file, or options are given that are for rows of other forms.
    """

    form = "jsonl"
    part_suffix = ".jsonl"

    def __init__(self, path: str, options: RowOptions):
        super().__init__(path, options)
        given = [name for name in ("prompt", "system", "columns", "sampling") if getattr(options, name)]
        if given:
            raise BatchError(
                f"lines of a JSONL file are whole requests: {', '.join(given)} can't be given for all of them"
            )
        self._files = {file.name: file for file in find_files(path, (".jsonl", ".ndjson"))}

    def identity(self) -> dict[str, Any]:
        """The names, sizes and both ends of the files.

        Raises:
          BatchError: a file can't be read now, or it is the only one and not to be had.
        """
        digest = hashlib.sha256()
        for file in self._files.values():
            digest.update(f"{file.name}\0{file.size}\0".encode("utf-8", "surrogateescape"))
            try:
                digest.update(look_again(functools.partial(_ends, file)))
            except NOT_TO_BE_HAD as error:
                if len(self._files) == 1:
                    raise BatchError(f"can't read the input {self.path!r}: {error.strerror or error}") from error
                digest.update(b"unreadable")
            except OSError as error:
                raise self._refused(file, error) from error
        return {
            "files": len(self._files),
            "bytes": sum(file.size for file in self._files.values()),
            "sha256": digest.hexdigest(),
        }

    def units(self, rows_per_unit: int) -> Iterator[Unit]:
        """Runs of lines; no unit has lines of two files. A file that is not to be had is a unit of no rows.

        Raises:
          BatchError: a file can't be read now.
        """
        names = array.array("Q")  # 8 bytes of each row's name
        units: list[Unit] = []
        for file in self._files.values():
            begin = len(units), len(names)
            try:
                look_again(functools.partial(self._scan_from, begin, file, rows_per_unit, units, names))
            except NOT_TO_BE_HAD as error:
                reason = f"{file.name}: can't be read from byte {_end(units, file)} on: {error.strerror or error}"
                first_row = units[-1].first_row + units[-1].num_rows if units else 0
                del names[first_row:]
                where = {"file": file.name}
                units.append(Unit(index=len(units), first_row=first_row, num_rows=0, where=where, error=reason))
            except OSError as error:
                raise self._refused(file, error) from error
        repeated = _repeated(names)
        for unit in units:
            inside = repeated[
                np.searchsorted(repeated, unit.first_row) : np.searchsorted(repeated, unit.first_row + unit.num_rows)
            ]
            yield Unit(
                index=unit.index,
                first_row=unit.first_row,
                num_rows=unit.num_rows,
                where={**unit.where, "repeated": inside.tolist()} if len(inside) else unit.where,
                error=unit.error,
            )

    def _refused(self, file: InputFile, error: OSError) -> BatchError:
        return BatchError(
            f"can't read {file.name!r} of the input {self.path!r}: {reason_of(error)}; give the same command again "
            "when it can be read"
        )

    def _scan_from(
        self, begin: tuple[int, int], file: InputFile, rows_per_unit: int, units: list[Unit], names: array.array
    ) -> None:
        """`_scan` without what an earlier try appended behind so many units and names."""
        del units[begin[0] :], names[begin[1] :]
        self._scan(file, rows_per_unit, units, names)

    def _scan(self, file: InputFile, rows_per_unit: int, units: list[Unit], names: array.array) -> None:
        """Append the units of a file, and the names of its rows."""
        with file.open() as stream:
            begin, offset, first_row, digest = 0, 0, len(names), hashlib.sha256()

            def end_unit() -> None:
                where = {"file": file.name, "begin": begin, "end": offset, "sha256": digest.hexdigest()}
                units.append(Unit(index=len(units), first_row=first_row, num_rows=len(names) - first_row, where=where))

            for line, offset in read_lines_from(stream):
                digest.update(line.data or b"")
                names.append(_name_of(line))
                if len(names) - first_row == rows_per_unit:
                    end_unit()
                    begin, first_row, digest = offset, len(names), hashlib.sha256()
            if len(names) > first_row:
                end_unit()

    def rows(self, unit: Unit) -> Iterator[Row]:
        """The requests in a unit's lines, or their refusals; see `Source.rows`.

        Lines are read twice, so that no row is given that is not as it was when the job was made.

        Raises:
          BatchError: the file is not as it was.
        """
        if not unit.num_rows:
            return
        repeated = frozenset(unit.where.get("repeated", ()))
        file = self._files.get(unit.where["file"])
        if file is None:
            raise BatchError(f"{unit.where['file']!r}, which the job was made with, is not in the input {self.path!r}")
        changed = BatchError(
            f"{file.name!r} of the input {self.path!r} is not as it was when the job was made (rows from "
            f"{unit.first_row} on); put it back, or start again with another output"
        )
        place = unit.where["begin"], unit.where["end"]
        digest, marks = hashlib.sha256(), array.array("Q")
        with file.open() as stream:
            for line, _ in read_lines_from(stream, *place):
                digest.update(line.data or b"")
                marks.append(_hash(line.data or b""))
            if digest.hexdigest() != unit.where["sha256"]:
                raise changed
            lines = (line for line, _ in read_lines_from(stream, *place))
            for number, (line, mark) in enumerate(itertools.zip_longest(lines, marks), start=unit.first_row):
                if line is None or _hash(line.data or b"") != mark:  # it changes while it is read
                    raise changed
                yield self._row(number, line, repeated)

    def _row(self, number: int, line: Line, repeated: frozenset[int]) -> Row:
        custom_id, request = None, None
        try:
            value = decode_line(line)
            custom_id = custom_id_of(value)
            if number in repeated:
                raise Refusal("custom_id was used by an earlier line", code="duplicate_custom_id", param="custom_id")
            request = parse_request(value, self.options.defaults)
        except Refusal as refusal:
            request = refusal
        return Row(number=number, custom_id=custom_id, request=request)

    def record(self, row: Row, output: RequestOutput) -> dict[str, Any]:
        """A line of OpenAI's output format; its ids count rows from 1."""
        assert isinstance(row.request, BatchRequest), "an answered row has a request"
        return answer_value(row.number + 1, row.request, output)


def _ends(file: InputFile) -> bytes:
    """What is read of a file for its identity."""
    with file.open() as stream:
        begin = stream.read(_SAMPLED_BYTES)
        stream.seek(max(_SAMPLED_BYTES, file.size - _SAMPLED_BYTES))
        return begin + stream.read(_SAMPLED_BYTES)


def _name_of(line: Line) -> int:
    """64 bits of a row's ``custom_id``; 0 where it has none."""
    try:
        custom_id = custom_id_of(decode_line(line))
    except Refusal:
        return 0
    return _hash(custom_id.encode("utf-8", "surrogatepass")) or 1


def _hash(data: bytes) -> int:
    """64 bits of some bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _repeated(names: array.array) -> np.ndarray:
    """Rows whose name stands at an earlier row, in their order."""
    values = np.frombuffer(names, np.uint64) if names else np.zeros(0, np.uint64)
    ordered = np.sort(values)
    twice = np.unique(ordered[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)])
    rows = np.flatnonzero(np.isin(values, twice)) if len(twice) else np.zeros(0, np.int64)
    _, first = np.unique(values[rows], return_index=True)
    return np.delete(rows, first)


def _end(units: Sequence[Unit], file: InputFile) -> int:
    """Up to which byte of a file units reach."""
    return units[-1].where.get("end", 0) if units and units[-1].where["file"] == file.name else 0
