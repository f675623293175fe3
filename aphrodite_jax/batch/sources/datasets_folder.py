"""A folder that ``datasets`` wrote with ``save_to_disk``, or a local one that its ``load_dataset`` makes sense of."""

import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from aphrodite_jax.batch.sources.base import RowOptions
from aphrodite_jax.batch.sources.shards import Shards, find_shards, missing_library, reason_of
from aphrodite_jax.batch.sources.tables import BATCH_ROWS, Table, TableSource, is_damage, pa
from aphrodite_jax.errors import BatchError

__all__ = ["DatasetsSource"]

_STATE, _SPLITS = "state.json", "dataset_dict.json"


class DatasetsSource(TableSource):
    """Rows of a dataset's Arrow files, in the dataset's order.

    A folder that ``save_to_disk`` did not write is given to ``datasets.load_dataset``, which copies its rows to its own
    cache on this machine (``HF_DATASETS_CACHE``) and reads them from there.

    Raises:
      BatchError: the folder is no dataset, or has several splits.
    """

    form = "datasets"

    def __init__(self, path: str, options: RowOptions):
        path = path.rstrip("/")
        try:
            filesystem, place = url_to_fs(path)
            if not filesystem.isdir(place):
                raise BatchError(f"the input {path!r} is not a folder; a dataset is one that save_to_disk made")
            if filesystem.isfile(f"{place}/{_SPLITS}"):
                splits = json.loads(filesystem.cat_file(f"{place}/{_SPLITS}"))["splits"]
                place = f"{place}/{_only_split(splits, path)}"
            saved = filesystem.isfile(f"{place}/{_STATE}")
            names = _names(json.loads(filesystem.cat_file(f"{place}/{_STATE}")), path) if saved else []
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise BatchError(f"can't read the dataset {path!r}: {reason_of(error)}") from error
        self._cached: dict[str, str] = {}
        if saved:
            shards = Shards(filesystem, place, {name: _size(filesystem, f"{place}/{name}") for name in names})
        elif isinstance(filesystem, LocalFileSystem):
            shards = find_shards(path, ("",))
            self._cached = _load(place)
            names = list(self._cached)
        else:
            raise BatchError(
                f"the input {path!r} was not written by save_to_disk, and such a folder is read on this machine alone"
            )
        super().__init__(path, options, shards, names)

    def open_table(self, name: str) -> Table:
        """One of the Arrow files."""
        return _ArrowTable(self.shards, self._cached.get(name, self.shards.path(name)))

    def image(self, shard: str, place: str) -> Any:
        """A relative path starts at the dataset's folder."""
        return self.shards.image("" if shard in self._cached else shard, place)


class _ArrowTable(Table):
    """A file in Arrow's stream format, which is read from its start."""

    def __init__(self, shards: Shards, path: str):
        self._shards, self._path = shards, path
        self._sources: list[Any] = []
        try:
            self.schema = self._open(mapped=True).schema
        except BaseException:
            self.close()
            raise

    def count(self) -> tuple[int, str | None]:
        num_rows = 0
        try:
            for batch in self._open(mapped=True):
                num_rows += batch.num_rows
        except Exception as error:
            if not is_damage(error):
                raise
            name = posixpath.basename(self._path)
            return num_rows, f"the file {name!r} is damaged after {num_rows} rows: {reason_of(error)}"
        return num_rows, None

    def start_before(self, row: int) -> int:
        return 0

    def batches(self, start: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        self.close()
        # Not mapped: what is read of a mapped file stays in memory as long as there is room.
        for batch in self._open(mapped=False):
            batch = batch.select(columns)
            for first in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(first, BATCH_ROWS)

    def close(self) -> None:
        while self._sources:
            self._sources.pop().close()

    def _open(self, *, mapped: bool) -> Any:
        """A reader from the file's start; a mapped file is read only where it is looked at."""
        if not self._shards.is_local:
            source = self._shards.filesystem.open(self._path, "rb")
        else:
            source = pa.memory_map(self._path) if mapped else pa.OSFile(self._path)
        self._sources.append(source)
        return pa.ipc.open_stream(source)


def _only_split(splits: Sequence[str], path: str, how: str = "give the folder of one") -> str:
    if len(splits) != 1:
        raise BatchError(f"the dataset {path!r} has the splits {', '.join(splits) or '(none)'}; {how}")
    return splits[0]


def _names(state: dict[str, Any], path: str) -> list[str]:
    """The Arrow files of a saved dataset."""
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise BatchError(
            f"the dataset {path!r} was saved with an order of rows beside its rows, as old versions of datasets do; "
            "load it and save it again"
        )
    return [file["filename"] for file in state["_data_files"]]


def _size(filesystem: Any, path: str) -> int:
    """Bytes of a file; -1 of one that is not there, which is found when it is read."""
    try:
        return filesystem.size(path)
    except FileNotFoundError:
        return -1


def _load(path: str) -> dict[str, str]:
    """The Arrow files into which ``load_dataset`` turns a folder, by name."""
    try:
        import datasets
    except ImportError as error:
        raise missing_library("datasets", "a folder that save_to_disk did not write") from error
    try:
        found = datasets.load_dataset(path, keep_in_memory=False)
    except Exception as error:  # of a loader of the library's, for any kind of file
        raise BatchError(f"datasets.load_dataset can't read {path!r}: {reason_of(error)}") from error
    split = _only_split([str(split) for split in found], path, how="give the files of one alone")
    files = [Path(file["filename"]) for file in found[split].cache_files]
    return {file.name: os.fspath(file) for file in files}
