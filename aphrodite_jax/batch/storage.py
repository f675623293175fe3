"""Where the parts of a job stand: a directory of this machine, or any address that `fsspec` opens.

A file appears whole or not at all. On this machine it is written beside its place and renamed; elsewhere it is made
here first and then sent, and whether a file that was sent in part can be seen depends on the file system: on object
stores it can't. A part counts only when its mark in ``done/``, which is sent last, is there.
"""

import abc
import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from aphrodite_jax.batch.output import OutputFile, lock_file, open_output
from aphrodite_jax.errors import BatchError

__all__ = ["Storage", "open_storage"]

Write = Callable[[BinaryIO], None]
LOCK = ".lock"


def open_storage(place: str) -> "Storage":
    """The storage at a path or address; nothing is made there yet.

    Raises:
      BatchError: an address that `fsspec` doesn't know, or a file that is there already.
    """
    try:
        filesystem, path = url_to_fs(place)
        is_file = filesystem.isfile(path)
    except (OSError, ValueError, ImportError) as error:
        raise BatchError(f"can't use the output {place!r}: {error}") from error
    if is_file:
        raise BatchError(f"the output {place!r} is a file; give a directory, or a name that ends in .jsonl")
    return LocalStorage(path) if isinstance(filesystem, LocalFileSystem) else RemoteStorage(filesystem, path, place)


class Storage(abc.ABC):
    """Files by their names below one place, with ``/`` between folders.

    All methods raise `BatchError` where the system refuses; what is there then stays.
    """

    place: str

    @abc.abstractmethod
    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there."""

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The bytes of several files, in their order."""
        return map(self.read, names)

    @abc.abstractmethod
    def lines(self, name: str) -> Iterator[bytes]:
        """A file's lines, one at a time."""

    @abc.abstractmethod
    def read_between(self, name: str, begin: int, end: int) -> bytes:
        """A file's bytes from one offset to another."""

    @abc.abstractmethod
    def size(self, name: str) -> int | None:
        """A file's bytes; None if it is not there."""

    @abc.abstractmethod
    def write_with(self, name: str, write: Write) -> tuple[int, str]:
        """Put in place what ``write`` writes to an open file; its bytes and SHA-256."""

    def write(self, name: str, data: bytes) -> None:
        """Put a file in place."""
        self.write_with(name, lambda file: _write_to(file, data))

    @abc.abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Names in a folder, without it, and their bytes; files that are being written are left out."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it is there."""

    @abc.abstractmethod
    def making(self) -> contextlib.AbstractContextManager[None]:
        """Held by one run while it makes the job; other runs of this machine wait."""

    @abc.abstractmethod
    def open_journal(self, name: str) -> tuple[OutputFile, Callable[[], None]]:
        """Open or create a file to be grown, and how to close it.

        Raises:
          OutputHeld: another run of this machine has it open.
        """

    @abc.abstractmethod
    def keep_journal(self, name: str) -> None:
        """Have an open journal outlast this process, where it does not anyway."""


class LocalStorage(Storage):
    """A directory of this machine."""

    def __init__(self, place: str):
        self.place = place

    def _path(self, name: str) -> str:
        return os.path.join(self.place, *name.split("/"))

    def read(self, name: str) -> bytes | None:
        with _can("read", self._path(name)):
            try:
                with open(self._path(name), "rb") as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def lines(self, name: str) -> Iterator[bytes]:
        with _can("read", self._path(name)), open(self._path(name), "rb") as file:
            yield from file

    def read_between(self, name: str, begin: int, end: int) -> bytes:
        with _can("read", self._path(name)), open(self._path(name), "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def size(self, name: str) -> int | None:
        with _can("read", self._path(name)):
            try:
                return os.stat(self._path(name)).st_size
            except FileNotFoundError:
                return None

    def write_with(self, name: str, write: Write) -> tuple[int, str]:
        path = self._path(name)
        folder, last = os.path.split(path)
        # The lock that a run holds keeps others of this machine away.
        partial = os.path.join(folder, f".{last}.{socket.gethostname()}.partial")
        with _can("write", path):
            try:
                os.makedirs(folder, exist_ok=True)
                with open(partial, "wb+") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    facts = _facts(file)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
                raise
        return facts

    def sizes(self, folder: str) -> dict[str, int]:
        with _can("read", self._path(folder)):
            try:
                with os.scandir(self._path(folder) if folder else self.place) as entries:
                    return {entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")}
            except FileNotFoundError:
                return {}

    def remove(self, name: str) -> None:
        with _can("remove", self._path(name)), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        path = self._path(LOCK)
        with contextlib.ExitStack() as stack:
            with _can("write", path):
                os.makedirs(self.place, exist_ok=True)
                lock = stack.enter_context(open(path, "wb"))
                lock_file(lock.fileno(), wait=True)
            yield

    def open_journal(self, name: str) -> tuple[OutputFile, Callable[[], None]]:
        path = self._path(name)
        with _can("write", path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        while True:
            file, close = _open(path)
            # Between opening and locking, a run that made the part whole may have removed it.
            if file.is_at_its_path():
                return file, close
            close()

    def keep_journal(self, name: str) -> None:
        """It is there already."""


class RemoteStorage(Storage):
    """A place that `fsspec` opens; journals, and locks for runs of this machine, are kept here until a run ends."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, path: str, place: str):
        self.place = place
        self._filesystem, self._root = filesystem, path.rstrip("/")
        self._spooled: dict[str, str] = {}  # open journals to files of this machine

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _stripped(self, name: str) -> str:
        """As the file system lists it."""
        return str(self._filesystem._strip_protocol(self._path(name))).rstrip("/")

    def _url(self, name: str) -> str:
        return f"{self.place.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        with _can("read", self._url(name), Exception):
            try:
                self._filesystem.invalidate_cache()
                return self._filesystem.cat_file(self._path(name))  # pyright: ignore[reportReturnType]
            except FileNotFoundError:
                return None

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        for begin in range(0, len(names), 256):  # those of an asynchronous file system come together
            some = names[begin : begin + 256]
            with _can("read", self._url(some[0]), Exception):
                found: Any = self._filesystem.cat([self._path(name) for name in some], on_error="omit")
            found = {key.rstrip("/"): data for key, data in found.items()}
            for name in some:
                yield found.get(self._stripped(name))

    def lines(self, name: str) -> Iterator[bytes]:
        with _can("read", self._url(name), Exception), self._filesystem.open(self._path(name), "rb") as file:
            yield from file  # pyright: ignore[reportReturnType]

    def read_between(self, name: str, begin: int, end: int) -> bytes:
        with _can("read", self._url(name), Exception):
            data: Any = self._filesystem.cat_file(self._path(name), start=begin, end=end)
            return data

    def size(self, name: str) -> int | None:
        with _can("read", self._url(name), Exception):
            try:
                self._filesystem.invalidate_cache()
                return self._filesystem.size(self._path(name))
            except FileNotFoundError:
                return None

    def write_with(self, name: str, write: Write) -> tuple[int, str]:
        with _can("write", tempfile.gettempdir()), tempfile.TemporaryFile("wb+") as spool:
            write(spool)  # pyright: ignore[reportArgumentType]
            spool.flush()
            facts = _facts(spool)
            spool.seek(0)
            self._send(spool, name)
        return facts

    def _send(self, file: Any, name: str) -> None:
        with _can("write", self._url(name), Exception):
            self._filesystem.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            target: Any = self._filesystem.open(self._path(name), "wb")
            try:
                shutil.copyfileobj(file, target, 2**22)
            except BaseException:  # closing it, as its finalizer does, would put in place what was sent so far
                with contextlib.suppress(Exception):
                    target.discard()
                with contextlib.suppress(AttributeError):
                    target.closed = True
                raise
            target.close()

    def sizes(self, folder: str) -> dict[str, int]:
        with _can("read", self._url(folder), Exception):
            self._filesystem.invalidate_cache()
            try:
                entries = self._filesystem.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        own = self._stripped(folder)
        found = {entry["name"].rstrip("/"): entry.get("size") or 0 for entry in entries}
        return {name.rpartition("/")[2]: size for name, size in found.items() if name != own}

    def remove(self, name: str) -> None:
        with _can("remove", self._url(name), Exception), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))

    def making(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # equal runs write equal files

    def open_journal(self, name: str) -> tuple[OutputFile, Callable[[], None]]:
        address = hashlib.sha256(self._url(name).encode()).hexdigest()[:32]
        path = os.path.join(tempfile.gettempdir(), f"aphrodite-jax-journal-{os.getuid()}-{address}")
        while True:
            file, close_file = _open(path)
            # Between opening and locking, a run that made the part whole may have removed it.
            if file.is_at_its_path():
                break
            close_file()

        def close() -> None:
            self._spooled.pop(name, None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            close_file()

        try:
            file.truncate(0)  # of a run that was killed: what it had sent counts
            file.append(self.read(name) or b"")
        except BaseException:
            close()
            raise
        self._spooled[name] = path
        return file, close

    def keep_journal(self, name: str) -> None:
        with _can("read", self._spooled[name]), open(self._spooled[name], "rb") as file:
            self._send(file, name)


def _open(path: str) -> tuple[OutputFile, Callable[[], None]]:
    stack = contextlib.ExitStack()
    return stack.enter_context(open_output(path)), stack.close


def _write_to(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _facts(file: Any) -> tuple[int, str]:
    """Bytes and SHA-256 of an open file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _can(do: str, path: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """Say what could not be done where the system refuses; libraries of other systems have errors of any ``kind``."""
    try:
        yield
    except BatchError:
        raise
    except kind as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise BatchError(f"can't {do} {path!r}: {reason}; mend that, and give the same command again") from error
