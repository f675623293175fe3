"""A folder of images: each is a row, and all are asked the same."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from aphrodite_jax.batch.sources import IMAGE_SUFFIXES
from aphrodite_jax.batch.sources.base import RemoteFile, Row, RowOptions, Source, Unit
from aphrodite_jax.errors import BatchError

__all__ = ["FolderSource"]


class FolderSource(Source):
    """Images below a folder, in the order of their paths; a row is called by its path there.

    Files are told by the ends of their names. Names that begin with a dot are left out, and links to folders are not
    followed.

    Raises:
      BatchError: there is no such folder, or there is no prompt.
    """

    form = "folder"
    part_suffix = ".jsonl"

    def __init__(self, path: str, options: RowOptions):
        super().__init__(path, options)
        if options.prompt is None:
            raise BatchError("images of a folder need a prompt (--prompt)")
        if options.columns:
            raise BatchError("a folder of images has no columns")
        try:
            self._filesystem, self._root = url_to_fs(path)
            is_folder = self._filesystem.isdir(self._root)
        except (OSError, ValueError, ImportError) as error:
            raise BatchError(f"can't read the input {path!r}: {error}") from error
        if not is_folder:
            raise BatchError(f"the input {path!r} is no folder")
        self._local = isinstance(self._filesystem, LocalFileSystem)

    def identity(self) -> dict[str, Any]:
        """The images' paths below the folder, and their sizes."""
        digest, count, total = hashlib.sha256(), 0, 0
        for name, size in self._images():
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            count, total = count + 1, total + size
        return {"files": count, "bytes": total, "sha256": digest.hexdigest()}

    def units(self, rows_per_unit: int) -> Iterator[Unit]:
        """Runs of paths."""
        images, first_row = self._images(), 0
        for index in itertools.count():
            names = [name for name, _ in itertools.islice(images, rows_per_unit)]
            if not names:
                return
            yield Unit(index=index, first_row=first_row, num_rows=len(names), where={"files": names})
            first_row += len(names)

    def rows(self, unit: Unit) -> Iterator[Row]:
        """A request about each image."""
        for number, name in enumerate(unit.where.get("files", ()), start=unit.first_row):
            messages = self.options.messages([self._image(name)])
            yield Row(number=number, custom_id=name, request=self.options.request(name, messages))

    def _image(self, name: str) -> Path | RemoteFile:
        if self._local:
            return Path(self._root, name)
        return RemoteFile(self._filesystem.unstrip_protocol(f"{self._root.rstrip('/')}/{name}"))

    def _images(self) -> Iterator[tuple[str, int]]:
        """Paths below the folder and bytes, in the order of their names, one folder in memory at a time."""
        pending = [""]
        while pending:
            folder = pending.pop()
            folders = []
            for name, size in self._entries(folder):
                if size is None:
                    folders.append(f"{folder}{name}/")
                elif name.lower().endswith(IMAGE_SUFFIXES):
                    yield f"{folder}{name}", size
            pending += reversed(folders)

    def _entries(self, folder: str) -> list[tuple[str, int | None]]:
        """Names in a folder in their order, and bytes; None for a folder."""
        place = os.path.join(self._root, folder) if self._local else f"{self._root.rstrip('/')}/{folder}".rstrip("/")
        try:
            found = _local_entries(place) if self._local else _remote_entries(self._filesystem, place)
        except OSError as error:
            raise BatchError(f"can't read the folder {place!r}: {error.strerror or error}") from error
        return sorted((name, size) for name, size in found if not name.startswith("."))


def _local_entries(place: str) -> Iterator[tuple[str, int | None]]:
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.name, None
            elif entry.is_file():
                yield entry.name, entry.stat().st_size


def _remote_entries(filesystem: fsspec.AbstractFileSystem, place: str) -> Iterator[tuple[str, int | None]]:
    for entry in filesystem.ls(place, detail=True):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if name:
            yield name, None if entry["type"] == "directory" else entry["size"]
