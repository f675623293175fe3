"""A name for the content of a media item, so that equal items are mapped and encoded once."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import FrozenDict
from PIL import Image

from aphrodite_jax.multimodal.video import Video

__all__ = ["content_hash"]


def content_hash(item: Any, options: Mapping[str, Any] = FrozenDict()) -> str:
    """SHA-256 of an opened item and of what else decides its arrays, such as the processor's options.

    Images are told apart by mode, size, palette, transparency and pixels; arrays by dtype, shape and bytes.
    Lists and tuples are alike; mappings are taken in the order of their keys.

    Args:
      item: an image, an array, a number, text, bytes, None, or a list, tuple, mapping or `Video` of these.

    Raises:
      TypeError: any other type, whose content can't be known.
    """
    digest = hashlib.sha256()
    _feed(digest, item)
    _feed(digest, options)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add ``value`` with its type and length, so that no two values run together to the same bytes."""
    if isinstance(value, Image.Image):
        _feed(digest, ("image", value.mode, value.size))
        # A palette's entries and a transparent colour decide what the same bytes look like.
        _feed(digest, (value.getpalette("RGBA") if value.mode in ("P", "PA") else None,
                       value.info.get("transparency")))  # fmt: skip
        _feed(digest, value.tobytes())
    elif isinstance(value, Video):
        _feed(digest, ("video", value.frames, value.timestamps, value.frame_indices))
    elif isinstance(value, Mapping):
        _feed(digest, [f"mapping of {len(value)}", *((key, value[key]) for key in sorted(value, key=repr))])
    elif isinstance(value, list | tuple):
        _put(digest, f"sequence of {len(value)}", b"")
        for element in value:
            _feed(digest, element)
    elif isinstance(value, bytes | bytearray | memoryview):
        _put(digest, "bytes", bytes(value))
    elif isinstance(value, str):
        _put(digest, "str", value.encode("utf-8", "surrogatepass"))
    elif value is None or isinstance(value, bool | int | float):
        _put(digest, type(value).__name__, repr(value).encode())
    elif hasattr(value, "__array__"):
        array = np.ascontiguousarray(value)
        _put(digest, f"array {array.dtype.str} {array.dtype.name} {np.shape(value)}", array.tobytes())
    else:
        raise TypeError(f"content_hash takes images, arrays and plain values, got {type(value).__name__}")


def _put(digest: Any, kind: str, content: bytes) -> None:
    digest.update(f"{kind}:{len(content)}:".encode())
    digest.update(content)
