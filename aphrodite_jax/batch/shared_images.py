"""Images that several rows name: read, fetched and decoded once while they are near each other.

The rest is kept by content further on: mapped arrays by the registry, encoded rows by the engine.
"""

import collections
import hashlib
import os
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from aphrodite_jax.batch.sources import RemoteFile
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError
from aphrodite_jax.multimodal.media import open_image

__all__ = ["SharedImages"]

CAPACITY = 256 * 2**20
"""Bytes of decoded images that are kept."""


class SharedImages:
    """Decoded images, the least recently used dropped first; safe to share between threads.

    Args:
      model_config: says what may be opened.
      capacity: bytes of pixels that are kept.
    """

    def __init__(self, model_config: ModelConfig, capacity: int = CAPACITY):
        self._model_config = model_config
        self._capacity = capacity
        self._kept: collections.OrderedDict[Any, Future[Image.Image]] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.num_decoded = 0

    def in_messages(self, messages: Sequence[Any]) -> list[Any]:
        """Messages with each image that a path, an address or bytes give in its place, decoded.

        What has another form is left as it is: who renders the messages says what is wrong with it.

        Raises:
          MediaError: an image that can't be opened.
        """
        return [self._in_message(message) for message in messages]

    def _in_message(self, message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list | tuple):
            return message
        return {**message, "content": [self._in_part(part) for part in message["content"]]}

    def _in_part(self, part: Any) -> Any:
        image = _source_of(part)
        if image is None:
            return part
        return {"type": "image", "image": self.open(image)}

    def open(self, source: str | bytes | os.PathLike | RemoteFile) -> Image.Image:
        """The decoded image, which other rows may hold too.

        Raises:
          MediaError: it can't be opened.
        """
        key = _key(source)
        if key is None:
            return self._decode(source)
        with self._lock:
            future = self._kept.get(key)
            if future is None:
                mine = self._kept[key] = Future()
            else:
                mine = None
                self._kept.move_to_end(key)
        if future is not None:
            return future.result()
        assert mine is not None
        try:
            image = self._decode(source)
        except BaseException as error:
            with self._lock:
                self._kept.pop(key)
            mine.set_exception(error)
            raise
        mine.set_result(image)
        self._make_room(_num_bytes(image))
        return image

    def _decode(self, source: Any) -> Image.Image:
        self.num_decoded += 1
        if isinstance(source, RemoteFile):
            source = _fetch(source.url)
        return open_image(source, self._model_config)

    def _make_room(self, size: int) -> None:
        with self._lock:
            self._bytes += size
            while self._bytes > self._capacity:
                oldest = next(key for key, future in self._kept.items() if future.done())
                self._bytes -= _num_bytes(self._kept.pop(oldest).result())


def _source_of(part: Any) -> Any:
    """What gives the image of a message's part, if it is one that is opened here."""
    if not isinstance(part, Mapping):
        return None
    if part.get("type") == "image" and set(part) == {"type", "image"}:
        image = part["image"]
        return image if isinstance(image, str | bytes | Path | RemoteFile) else None
    if part.get("type") == "image_url" and set(part) == {"type", "image_url"}:
        value = part["image_url"]
        value = {"url": value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and set(value) <= {"url", "detail"} and value.get("detail", "auto") == "auto":
            return value["url"] if isinstance(value.get("url"), str) else None
    return None


def _key(source: Any) -> Any:
    """What tells an image from others before it is read; None if it can't be told."""
    if isinstance(source, RemoteFile):
        return source.url
    if isinstance(source, bytes):
        return hashlib.blake2b(source).digest()
    text = os.fspath(source)
    if text[:5].lower() == "data:":
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest()
    # Files of one address are one image as long as they are not written anew.
    if text[:5].lower() == "file:":
        text = re.sub(r"^//(localhost)?(?=/)", "", urllib.parse.unquote(text[5:]))
    try:
        status = os.stat(text)
    except (OSError, ValueError):
        return None
    return text, status.st_mtime_ns, status.st_size


def _fetch(url: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # libraries that reach other systems have errors of any type
        raise MediaError(f"can't fetch {url!r}: {type(error).__name__}: {error}") from error


def _num_bytes(image: Image.Image) -> int:
    return image.width * image.height * 3
