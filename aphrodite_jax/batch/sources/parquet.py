"""Parquet: a file, the files of a folder, or those of a pattern."""

from collections.abc import Iterator
from typing import Any

from aphrodite_jax.batch.sources.base import RowOptions
from aphrodite_jax.batch.sources.shards import find_shards
from aphrodite_jax.batch.sources.tables import BATCH_ROWS, Table, TableSource, pa, pq

__all__ = ["ParquetSource"]

_BUFFER_BYTES = 2**20
"""Read at a time of each column. Without it, pyarrow reads the column of a whole row group before it decodes."""


class ParquetSource(TableSource):
    """Rows of Parquet files, in the order of the files' names.

    Raises:
      BatchError: there is no such file.
    """

    form = "parquet"

    def __init__(self, path: str, options: RowOptions):
        shards = find_shards(path, (".parquet",))
        super().__init__(path, options, shards, list(shards.sizes))

    def open_table(self, name: str) -> Table:
        """One of the files."""
        path = self.shards.path(name)
        return _ParquetTable(pa.OSFile(path) if self.shards.is_local else self.shards.filesystem.open(path, "rb"))


class _ParquetTable(Table):
    def __init__(self, source: Any):
        self._source = source
        try:
            self._file = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except BaseException:
            source.close()
            raise
        self.schema = self._file.schema_arrow
        self._starts = [0]
        for group in range(self._file.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)

    def count(self) -> tuple[int, str | None]:
        return self._file.metadata.num_rows, None

    def start_before(self, row: int) -> int:
        return max(start for start in self._starts if start <= row)

    def batches(self, start: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for group, first in enumerate(self._starts[:-1]):
            if first >= start:  # one at a time, so that no batch has rows of the next one, which may be damaged
                yield from self._file.iter_batches(BATCH_ROWS, [group], columns, use_threads=False)

    def close(self) -> None:
        self._file.close()
        self._source.close()
