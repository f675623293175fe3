"""The answers file: locked by one run, grown by whole lines, valid whatever happens.

Every line goes to the system in one piece when it is ready, so a killed process loses none that it wrote; the
disk is asked to keep them once a second, so a power failure loses little more. If the disk refuses, the file
is cut back to its last whole line.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from aphrodite_jax.errors import BatchError

__all__ = ["OutputFile", "OutputHeld", "lock_file", "open_output", "replace_file"]

SYNC_SECONDS = 1.0
"""Longest time between a write and the `fsync` that follows it, while lines keep coming."""

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
"""What a file system answers that has no locks."""


class OutputHeld(BatchError):
    """Another run has the file open."""


class OutputFile:
    """An open file that ends, up to ``size`` bytes, with a whole line.

    Args:
      created: whether opening it made it.
      locked: whether it is this run's alone. If it is not, for want of locks, another run is noticed by what it writes.
    """

    def __init__(self, fd: int, path: str, *, created: bool, locked: bool = True):
        self.path, self.created, self._locked = path, created, locked
        self._lost = False
        self.size = os.fstat(fd).st_size
        self._fd = fd
        self._synced_size = self.size
        self._synced_at = time.monotonic()

    def lines(self) -> Iterator[bytes]:
        """The lines that are there, the last one perhaps without its end."""
        with open(self.path, "rb") as file:
            yield from file

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from one offset to another."""
        return os.pread(self._fd, end - begin, begin)

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def truncate(self, size: int) -> None:
        """Cut the file to its first ``size`` bytes."""
        os.ftruncate(self._fd, size)
        self.size, self._synced_size = size, min(size, self._synced_size)

    def append(self, data: bytes) -> None:
        """Write whole lines.

        Raises:
          OutputHeld: the file is not locked, and another run has written to it.
          BatchError: the system refused, or a `sync` failed before; the file ends where it ended before.
        """
        if self._lost:
            raise BatchError(f"{self.path!r} has lost lines that were written before; start again from what is there")
        if not self._locked and os.fstat(self._fd).st_size != self.size:
            raise OutputHeld(
                f"another run is writing {self.path!r}, on a file system without locks; let one of them end, and give "
                "the same command again"
            )
        try:
            _write_all(self._fd, data, self.size)
        except OSError as error:
            self.truncate(self.size)
            raise _refused(self.path, error) from error
        self.size += len(data)

    def sync_if_due(self) -> None:
        """`sync` if something was written and the last one is a while ago; as it raises."""
        if self.size != self._synced_size and time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have the disk keep what was written.

        Raises:
          BatchError: the disk could not; the file ends where it ended at the last sync, and takes nothing more.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._lost = True
            self.truncate(self._synced_size)
            raise _refused(self.path, error) from error
        self._synced_size, self._synced_at = self.size, time.monotonic()


@contextlib.contextmanager
def open_output(path: str) -> Iterator[OutputFile]:
    """Open or create ``path`` for one run alone, as far as its file system has locks.

    Raises:
      OutputHeld: another run has it open.
      BatchError: it can't be written, or is no regular file.
    """
    created = not os.path.exists(path)
    try:
        # O_NONBLOCK: opening a pipe that nobody reads is refused instead of waited for.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BatchError(f"the output {path!r} is no regular file, so a run could not be taken up again")
        try:
            locked = lock_file(fd, wait=False)
        except BlockingIOError as error:
            raise OutputHeld(f"another run is writing {path!r}; wait for it or give another output") from error
        except OSError as error:
            raise _refused(path, error) from error
        yield OutputFile(fd, path, created=created, locked=locked)
    finally:
        os.close(fd)


def lock_file(fd: int, *, wait: bool) -> bool:
    """Lock an open file for this run alone, until it is closed; False if its file system has no locks.

    Raises:
      BlockingIOError: another run has locked it, and ``wait`` is false.
      OSError: the system refused.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def replace_file(path: str, data: bytes) -> None:
    """Put ``data`` at ``path`` in one step: a reader sees the old file or the new one, whole.

    Raises:
      BatchError: it can't be written; what was at ``path`` stays.
    """
    partial = f"{path}.partial"
    try:
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise _refused(path, error) from error


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _refused(path: str, error: OSError) -> BatchError:
    return BatchError(
        f"can't write {path!r}: {error.strerror}; mend that, or give another output. Lines that are in the "
        "output are whole, and the same job goes on after them"
    )
