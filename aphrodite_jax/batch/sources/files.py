"""The files of an input: one, those of a pattern, or those of a folder; local, or any address that `fsspec` opens."""

import dataclasses
import glob
import io
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from aphrodite_jax.errors import BatchError

__all__ = ["NOT_TO_BE_HAD", "InputFile", "find_files", "is_not_to_be_had", "look_again"]

_BLOCK = 2**20
"""Bytes that are read at a time."""
NOT_TO_BE_HAD = (FileNotFoundError, PermissionError, IsADirectoryError)
"""Errors of a file that don't pass by themselves; what else the system refuses is tried again."""
PAUSES = (1.0, 4.0)
"""Seconds before a file is looked into again that the system refused to read."""

A = TypeVar("A")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file of an input: its name, which does not tell where the input stands, its place, and its bytes."""

    name: str
    place: str
    size: int
    filesystem: fsspec.AbstractFileSystem

    def open(self) -> BinaryIO:
        """The file, to be read in any order.

        Raises:
          OSError: it can't be opened.
        """
        if isinstance(self.filesystem, LocalFileSystem):
            return open(self.place, "rb", buffering=_BLOCK)
        return io.BufferedReader(_Raw(self.filesystem.open(self.place, "rb")), _BLOCK)  # pyright: ignore


class _Raw(io.RawIOBase):
    """A file of `fsspec` under a buffer of Python's, which finds ends of lines faster."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def find_files(path: str, suffixes: Sequence[str]) -> list[InputFile]:
    """The files of an input, by name.

    Args:
      path: a file, whatever its name; a pattern with ``*``; or a folder, whose files with one of ``suffixes`` are
        taken, those in folders of it too. Names that begin with a dot are left out.

    Raises:
      BatchError: there are none, or the place can't be read.
    """
    try:
        filesystem, place = url_to_fs(path)
        place = place.rstrip("/") or "/"
        if glob.has_magic(place) and not filesystem.exists(place):
            root, found = _fixed_part(place), filesystem.glob(place, detail=True)
        elif filesystem.isdir(place):
            root, found = place, filesystem.find(place, detail=True)
            found = {name: info for name, info in found.items() if name.lower().endswith(tuple(suffixes))}
        elif filesystem.exists(place):
            info = filesystem.info(place)
            if info["type"] != "file":
                raise BatchError(f"the input {path!r} is not a file that can be read in parts")
            root, found = place.rpartition("/")[0], {place: info}
        else:
            raise BatchError(f"there is no input {path!r}")
    except (OSError, ValueError, ImportError) as error:
        raise BatchError(f"can't read the input {path!r}: {error}") from error
    files = [
        InputFile(name=name[len(root) :].lstrip("/"), place=name, size=info["size"], filesystem=filesystem)
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]
    files = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    if not files:
        raise BatchError(f"the input {path!r} has no file that ends in {' or '.join(suffixes)}")
    return files


def is_not_to_be_had(error: OSError) -> bool:
    """Whether an error is one of `NOT_TO_BE_HAD`."""
    return isinstance(error, NOT_TO_BE_HAD)


def look_again(look: Callable[[], A], is_final: Callable[[OSError], bool] = is_not_to_be_had) -> A:
    """What ``look`` gives, which is tried three times: a network that fails for a moment must not shape a job.

    Args:
      is_final: whether an error says that the file itself is at fault, so that it is of no use to try again.

    Raises:
      OSError: the last try's, or the first that is final.
    """
    for pause in PAUSES:
        try:
            return look()
        except OSError as error:
            if is_final(error):
                raise
        time.sleep(pause)
    return look()


def _fixed_part(pattern: str) -> str:
    """The folder in front of a pattern's first ``*``."""
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:fixed])
