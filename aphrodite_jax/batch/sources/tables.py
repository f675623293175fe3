"""Inputs that are tables in shards, read by `pyarrow`; their parts are Parquet files.

Units are runs of rows over the shards in their order, so a unit may end in one file and begin in another. A table is
read forwards in small batches. The reader of a unit is kept, and the next unit goes on with it if it begins further on
in the same file: a Parquet file can only be decoded from the start of a row group, which may hold many units.
"""

import abc
import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.sources.base import Row, RowOptions, Source, Unit
from aphrodite_jax.batch.sources.files import NOT_TO_BE_HAD, look_again
from aphrodite_jax.batch.sources.shards import Shards, in_order, missing_library, reason_of
from aphrodite_jax.errors import BatchError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise missing_library("pyarrow", "a job over a table") from missing

from aphrodite_jax.batch.sources.columns import Columns, images_of, pick_columns  # which needs pyarrow

__all__ = ["BATCH_ROWS", "Table", "TableSource", "is_damage"]

BATCH_ROWS = 16
"""Rows that are decoded at a time: enough to be fast, few enough for large images."""

_PART = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ]
)
_PART_BATCH = 1024


class Table(abc.ABC):
    """One open shard."""

    schema: pa.Schema

    @abc.abstractmethod
    def count(self) -> tuple[int, str | None]:
        """Rows that can be read, and why those behind them can't, if there are any."""

    @abc.abstractmethod
    def start_before(self, row: int) -> int:
        """The last row up to ``row`` at which reading can begin without decoding what is before it."""

    @abc.abstractmethod
    def batches(self, start: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Rows from ``start``, which `start_before` gave, in batches of at most `BATCH_ROWS`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the file."""


class TableSource(Source):
    """Rows of tables; a class of it says which files there are and opens one."""

    part_suffix = ".parquet"

    def __init__(self, path: str, options: RowOptions, shards: Shards, names: list[str]):
        super().__init__(path, options)
        self.shards, self.names = shards, names
        self._kept: collections.deque[_Reader] = collections.deque(maxlen=1)

    @abc.abstractmethod
    def open_table(self, name: str) -> Table:
        """Open one of ``names``."""

    def image(self, shard: str, place: str) -> Any:
        """What a row of the shard means by a path or URL."""
        return self.shards.image(shard, place)

    def identity(self) -> dict[str, Any]:
        """Names and sizes of the files."""
        return self.shards.identity()

    def units(self, rows_per_unit: int) -> Iterator[Unit]:
        """Runs of rows over all shards; a shard that can't be read is a unit of no rows.

        Raises:
          BatchError: no shard can be read, one can't be read now, or it is not clear from the first one which columns
            are meant.
        """
        index = first_row = size = 0
        ranges: list[list[Any]] = []
        first_error = None

        def unit(error: str | None = None) -> Unit:
            where = {"rows": ranges} if error is None else {"shard": name}
            return Unit(index=index, first_row=first_row, num_rows=size, where=where, error=error)

        for name, count in zip(self.names, in_order(self._count, self.names), strict=True):
            start = 0
            while start < count.num_rows:
                stop = min(count.num_rows, start + rows_per_unit - size)
                ranges.append([name, start, stop])
                size, start = size + stop - start, stop
                if size == rows_per_unit:
                    yield unit()
                    index, first_row, size, ranges = index + 1, first_row + size, 0, []
            if count.error is None:
                continue
            first_error = first_error or count.error
            if count.of_columns and not (index or size):
                raise BatchError(count.error)
            if size:
                yield unit()
                index, first_row, size, ranges = index + 1, first_row + size, 0, []
            yield unit(count.error)
            index += 1
        if size:
            yield unit()
        elif not first_row and first_error is not None:
            raise BatchError(f"no shard of {self.path!r} can be read; the first one: {first_error}")

    def rows(self, unit: Unit) -> Iterator[Row]:
        """Rows of a unit, in batches of a few; see `Source.rows`.

        Raises:
          BatchError: a file has fewer rows than when the units were made.
        """
        number = unit.first_row
        for name, start, stop in unit.where.get("rows", ()):
            reader = self._reader(name, start)
            try:
                for batch in reader.read(start, stop):
                    for cells in _cells(batch):
                        yield self._row(number, cells, name, reader.columns)
                        number += 1
            except BaseException:
                reader.table.close()
                raise
            self._kept.append(reader)

    def write_part(self, unit: Unit, records: Iterable[bytes], file: BinaryIO) -> None:
        """Write a Parquet file with the fields of a record as columns."""
        with pq.ParquetWriter(file, _PART) as writer:
            rows = []
            for record in map(json.loads, records):
                if set(record) != set(_PART.names):
                    raise ValueError(f"a record has {', '.join(_PART.names)}; got {', '.join(record)}")
                rows.append(record)
                if len(rows) == _PART_BATCH:
                    writer.write_table(pa.Table.from_pylist(rows, _PART))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, _PART))

    def _columns(self, schema: pa.Schema, name: str) -> Columns:
        has_prompt = self.options.prompt is not None
        return pick_columns(schema, self.options.columns, has_prompt=has_prompt, where=repr(name))

    def _count(self, name: str) -> "_Count":
        """How many rows a shard has; what is wrong with the file itself is its error."""
        try:
            return look_again(functools.partial(self._look, name), is_damage)
        except Exception as error:
            raise BatchError(f"can't read {name!r} of the input {self.path!r}: {reason_of(error)}") from error

    def _look(self, name: str) -> "_Count":
        try:
            table = self.open_table(name)
            try:
                num_rows, error = table.count()
                if num_rows:
                    self._columns(table.schema, name)
            finally:
                table.close()
        except BatchError as error:
            return _Count(0, str(error), of_columns=True)
        except Exception as error:
            if not is_damage(error):
                raise
            return _Count(0, f"the file {name!r} can't be read: {reason_of(error)}")
        return _Count(num_rows, error)

    def _reader(self, name: str, start: int) -> "_Reader":
        """One that stands at or before ``start``: the one that was kept, if it serves."""
        try:
            reader = self._kept.pop()
        except IndexError:
            reader = None
        if reader is not None and reader.name != name:
            reader.table.close()
            reader = None
        table = self.open_table(name) if reader is None else reader.table
        try:
            begin = table.start_before(start)
            if reader is not None and begin <= reader.position <= start:
                return reader
            return _Reader(name, table, self._columns(table.schema, name), begin)
        except BaseException:
            table.close()
            raise

    def _row(self, number: int, cells: Mapping[str, Any], shard: str, columns: Columns) -> Row:
        own = None if columns.id is None else cells[columns.id]
        custom_id = None if isinstance(own, Refusal) else str(number if own is None else own)
        try:
            for cell in cells.values():
                if isinstance(cell, Refusal):
                    raise cell
            assert custom_id is not None
            images = [
                self.image(shard, image) if isinstance(image, str) else image
                for image in images_of(cells[columns.image], columns.image)
            ]
            prompt = None if columns.prompt is None else cells[columns.prompt]
            request = self.options.request(custom_id, self.options.messages(images, prompt))
        except Refusal as refusal:
            return Row(number=number, custom_id=custom_id, request=refusal)
        return Row(number=number, custom_id=custom_id, request=request)


def is_damage(error: Exception) -> bool:
    """Whether an error says that a file is not what it should be, or not to be had, and not that reading failed once.

    `pyarrow` raises a bare OSError for some damaged files.
    """
    known = (pa.ArrowException, EOFError, *NOT_TO_BE_HAD)
    return isinstance(error, known) or (type(error) is OSError and error.errno is None)


def _cells(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The cells of each row by their columns; a `Refusal` in the place of one that is not UTF-8."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not look into strings as it reads them
        rows = ({name: _cell(batch, name, row) for name in batch.schema.names} for row in range(batch.num_rows))
    yield from rows


def _cell(batch: pa.RecordBatch, name: str, row: int) -> Any:
    try:
        return batch.column(name)[row].as_py()
    except UnicodeDecodeError as error:
        return Refusal(f"column {name!r} is not UTF-8: {error}", code="invalid_text")


@dataclasses.dataclass(frozen=True)
class _Count:
    """Rows of a shard that can be read; ``of_columns`` if the error is that the shard's columns don't fit the job."""

    num_rows: int
    error: str | None = None
    of_columns: bool = False


class _Reader:
    """Goes through a shard forwards. ``position`` is the row that comes next.

    It never looks ahead: what is damaged behind a unit is not that unit's failure.
    """

    def __init__(self, name: str, table: Table, columns: Columns, start: int):
        self.name, self.table, self.columns = name, table, columns
        self.position = start
        self._batches = table.batches(start, columns.names)
        self._rest: pa.RecordBatch | None = None

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows ``[start, stop)``, where ``start`` is not behind the position."""
        while self.position < stop:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                raise BatchError(f"the file {self.name!r} changed: it has {self.position} rows, and had more")
            skip = min(start - self.position, batch.num_rows) if self.position < start else 0
            take = min(stop - self.position - skip, batch.num_rows - skip)
            self.position += skip + take
            left = batch.num_rows - skip - take
            self._rest = batch.slice(skip + take) if left else None
            if take:
                yield batch.slice(skip, take)
