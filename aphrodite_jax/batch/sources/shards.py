"""The files of an input that lies in shards: a file, a folder, a pattern or braces, on any `fsspec` filesystem.

Images that a row names by a path or URL are found from here too. A relative one starts at the shard's own folder. A URL
is fetched only from the place (scheme and bucket or host) that the input itself lies in, so that rows don't make a
job read from anywhere else; other URLs are left to `open_image`, which says what it takes.
"""

import collections
import dataclasses
import hashlib
import os
import posixpath
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from aphrodite_jax.batch.sources.base import RemoteFile
from aphrodite_jax.batch.sources.files import find_files
from aphrodite_jax.errors import BatchError

__all__ = ["PROMPT_NAMES", "Shards", "find_shards", "in_order", "missing_library", "reason_of"]

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "text")
"""Names of columns, or of keys of a JSON object, by which a row's prompt is found."""

_URL = re.compile(r"(?:data|file):|([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_THREADS = 8
"""Shards that are looked into at a time when units are made: on a remote filesystem that is waiting alone."""

A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class Shards:
    """Files in the order of their rows.

    Attributes:
      filesystem: of `fsspec`.
      root: the folder that names start from, in the filesystem's own form.
      sizes: bytes of each file, by its name below ``root``.
    """

    filesystem: Any
    root: str
    sizes: dict[str, int]

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    def identity(self) -> dict[str, Any]:
        """How many files and bytes, and a digest of names and sizes."""
        digest = hashlib.sha256()
        for name, size in self.sizes.items():
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass"))
        return {"files": len(self.sizes), "bytes": sum(self.sizes.values()), "sha256": digest.hexdigest()}

    def path(self, name: str) -> str:
        """Where a file is, in the filesystem's own form."""
        return posixpath.join(self.root, name)

    def image(self, shard: str, place: str) -> str | RemoteFile:
        """What a row of the file ``shard`` means by a path or URL of an image."""
        if self.is_local:
            is_whole = _URL.match(place) or os.path.isabs(place)
            return place if is_whole else os.path.join(posixpath.dirname(self.path(shard)), place)
        if "::" in place:  # a chain of filesystems, to fsspec
            return place
        folder = urllib.parse.urlsplit(self.filesystem.unstrip_protocol(posixpath.dirname(self.path(shard))))
        if (found := _URL.match(place)) is None:
            # An absolute path is one of this machine, as Hugging Face's Image feature writes it.
            path = posixpath.normpath(f"{folder.path}/{place}")
            return place if place.startswith("/") else RemoteFile(f"{folder.scheme}://{folder.netloc}{path}")
        if found[1] is None or found[1].lower() not in _protocols(self.filesystem):
            return place
        url = self.filesystem.unstrip_protocol(type(self.filesystem)._strip_protocol(place))
        return RemoteFile(url) if urllib.parse.urlsplit(url)[:2] == folder[:2] else place


def find_shards(path: str, suffixes: Sequence[str]) -> Shards:
    """The files that ``path`` means to `find_files`; braces as in ``train-{000..009}.tar`` name each, in their order.

    Of a folder, what begins with ``_`` is left out too, since programs that write shards keep unfinished ones there.

    Raises:
      BatchError: there is no such file or no folder, or the filesystem can't be used.
    """
    paths, start = [path], None
    if "{" in path and not _exists(path):
        try:
            import braceexpand
        except ImportError as error:
            raise missing_library("braceexpand", "a pattern with braces") from error
        paths, start = list(braceexpand.braceexpand(path)), path.partition("{")[0]
    files = {file.place: file for one in paths for file in find_files(one, suffixes)}
    first = next(iter(files.values()))
    filesystem: Any = first.filesystem
    if start is None:
        root = first.place.removesuffix(first.name)
        root = root.rstrip("/") or root
    else:
        root = posixpath.dirname(url_to_fs(f"{start}x")[1])
    sizes = {place[len(root) :].lstrip("/"): file.size or 0 for place, file in files.items()}
    if filesystem.isdir(url_to_fs(path)[1]):
        sizes = {n: size for n, size in sizes.items() if not any(part.startswith("_") for part in n.split("/"))}
    if not sizes:
        raise BatchError(f"the input {path!r} has no file whose name does not begin with '_'")
    return Shards(filesystem, root, sizes)


def in_order(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``map`` by a few threads that run ahead a little."""
    ahead = collections.deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * _THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def missing_library(library: str, what: str) -> BatchError:
    """The error of a library that is not installed."""
    return BatchError(f"{what} needs {library}, which is not installed: pip install 'aphrodite-jax[batch]'")


def reason_of(error: BaseException) -> str:
    """An error of another library in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _exists(path: str) -> bool:
    try:
        filesystem, place = url_to_fs(path)
        return filesystem.exists(place)
    except (OSError, ValueError, ImportError) as error:
        raise BatchError(f"can't read the input {path!r}: {reason_of(error)}") from error


def _protocols(filesystem: Any) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)
