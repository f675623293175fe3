"""Opening images: any source and any Pillow mode to upright 8-bit RGB, within limits.

What every mode becomes:

- transparency (RGBA, LA, a palette's or a grey value's transparent entry) lies over white, as in the Hugging
  Face image processors;
- 16-bit grey keeps its 8 high bits' worth (65535 is white). 32-bit integers and floats have no fixed range:
  integers up to 255 are 8-bit and up to 65535 are 16-bit; floats up to 1 are fractions of white and up to 255
  are 8-bit; anything else is refused;
- all others (1-bit, grey, palette, CMYK, YCbCr, LAB, HSV) convert as Pillow converts them;
- an EXIF orientation is applied, so that the picture is upright;
- of a file with several frames the first is taken.

Formats that hold another picture, of a size that their own header does not tell, are not opened.
"""

import base64
import binascii
import contextlib
import io
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError

__all__ = ["is_image_file", "open_image", "read_media"]

_NOT_OPENED = {
    "BLP",  # these four may hold a whole JPEG or PNG of any size; ICO decodes it while it opens
    "ICNS",
    "ICO",
    "IPTC",
    "EPS",  # a program, which Pillow hands to Ghostscript
}
_PILLOW_LIMIT = threading.Lock()
_LAZY_IMAGES = threading.Lock()
"""Pillow reads the pixels of an opened file when they are wanted first, and fails if two threads want them at once."""


def open_image(source: Any, model_config: ModelConfig) -> Image.Image:
    """An image of its own, mode RGB and upright; ``source`` is not changed.

    Args:
      source: a Pillow image, a path, a ``file:`` or ``data:`` URL, the bytes of an image file, or a uint8 array
        ``[height, width]``, ``[height, width, 1]`` (grey), ``[height, width, 3]`` (RGB) or ``[.., 4]`` (RGBA).
      model_config: gives ``max_image_pixels`` and ``media_roots``.

    Raises:
      MediaError: no image, a damaged one, one of more pixels than allowed (checked before its pixels are
        decoded), or a source that may not be read.
    """
    limit = model_config.max_image_pixels
    if isinstance(source, Image.Image):
        return _decode(source, limit, f"{source.mode} image", loading=_LAZY_IMAGES)  # others may hold it too
    if isinstance(source, np.ndarray) or (hasattr(source, "__array__") and not isinstance(source, str | bytes)):
        return _decode(_from_array(np.asarray(source)), limit, "image array")
    if not isinstance(source, str | Path | bytes | bytearray | memoryview):
        raise MediaError(
            "an image is a Pillow image, a path, a file: or data: URL, bytes or a uint8 array, "
            f"got {type(source).__name__}"
        )
    content, name = read_media(source, model_config, "image")
    try:
        image = _open_file(content, _NOT_OPENED)
    except Exception as error:
        raise MediaError(
            f"{name} is no image file that can be read (convert {', '.join(sorted(_NOT_OPENED))} to PNG): "
            f"{_reason(error)}"
        ) from error
    with image:
        return _decode(image, limit, name)


def is_image_file(content: bytes | bytearray | memoryview) -> bool:
    """Whether these are the bytes of an image file, by the header, and not of a video's.

    MPEG is a video's format, though Pillow knows it, and TGA has no signature: the bytes of a video may look like it.
    """
    try:
        _open_file(bytes(content), _NOT_OPENED | {"MPEG", "TGA"}).close()
    except Exception:  # Pillow's readers of headers fail in many ways
        return False
    return True


def _open_file(content: bytes, formats_left_out: set[str]) -> Image.Image:
    """Reads the header alone; fails with errors of any type."""
    Image.init()
    with _without_pillow_limit():
        return Image.open(io.BytesIO(content), formats=[known for known in Image.ID if known not in formats_left_out])


def read_media(source: Any, model_config: ModelConfig, what: str) -> tuple[bytes, str]:
    """The bytes behind a path, URL or bytes-like object, and a short name for messages about this ``what``.

    A file is read only from below ``model_config.media_roots``, whether a path or a URL names it.

    Raises:
      MediaError: a source that may not or can't be read.
    """
    if not isinstance(source, str | Path):
        return bytes(source), f"{what} of {len(source)} bytes"
    name = _short(str(source))
    scheme = source.partition(":")[0].lower() if isinstance(source, str) and ":" in source else ""
    if scheme in ("http", "https"):
        raise MediaError(f"{name}: nothing is fetched from the network; download it and give the file")
    if scheme == "data":
        return _read_data_url(str(source)), name
    if scheme == "file":
        return _read_file(_file_url_path(str(source)), model_config), name
    if "://" in str(source):
        raise MediaError(f"{name}: scheme {scheme!r} is not known; give a path, a file: or a data: URL")
    return _read_file(Path(source), model_config), name


def _file_url_path(url: str) -> Path:
    location = urllib.parse.unquote(url[len("file:") :])
    location = re.sub(r"^//(localhost)?(?=/)", "", location)
    path = Path(location)
    if not path.is_absolute() or location.startswith("//"):
        raise MediaError(f"{_short(url)}: a file: URL names a file of this machine, as in file:///pictures/cat.png")
    return path


def _read_file(path: Path, model_config: ModelConfig) -> bytes:
    name, roots = _short(str(path)), model_config.media_roots
    try:
        # Links are followed first: what counts is where the bytes lie.
        resolved = path.resolve()
        allowed = roots is None or any(resolved.is_relative_to(Path(root).resolve()) for root in roots)
        content = resolved.read_bytes() if allowed and resolved.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:
        raise MediaError(f"can't read {name}: {_reason(error)}") from error
    if not allowed:
        raise MediaError(f"{name} is outside media_roots ({', '.join(roots or ()) or 'no file may be read'})")
    if content is None:
        raise MediaError(f"{name} is not a file here")
    return content


def _read_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(f"{_short(url)}: a data: URL has a comma before its content")
    content = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return content
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{_short(url)}: the content is no base64: {_reason(error)}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise MediaError(
            "an image array is uint8 [height, width], [height, width, 3] (RGB) or [height, width, 4] (RGBA), "
            f"got {array.dtype}{list(array.shape)}"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _decode(
    image: Image.Image, limit: int, name: str, loading: contextlib.AbstractContextManager | None = None
) -> Image.Image:
    """Check the size that the header tells, then load the pixels, holding ``loading``: upright, RGB, and a copy."""
    width, height = image.size
    if width * height > limit:
        raise MediaError(
            f"{name} has {width} x {height} pixels, more than {limit}; scale it down or raise max_image_pixels"
        )
    if not width * height:
        raise MediaError(f"{name} has no pixels ({width} x {height})")
    try:
        with loading or contextlib.nullcontext():
            image.load()
        return _to_rgb(ImageOps.exif_transpose(image))  # which copies
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error
    # Pillow's decoders answer damaged files with errors of many types.
    except Exception as error:
        raise MediaError(f"{name} is damaged or truncated: {_reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        values, transparent = np.asarray(image), image.info.get("transparency")
        return _from_sixteen_bits(np.where(values == transparent, 65535, values))
    if image.mode in ("I", "F"):
        return _from_wide_pixels(np.asarray(image))
    if image.mode == "La":  # Pillow has no direct way from premultiplied grey
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bits(values: np.ndarray) -> Image.Image:
    eight = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(eight.astype(np.uint8)).convert("RGB")


def _from_wide_pixels(values: np.ndarray) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "i" and low >= 0 and 255 < high <= 65535:
        return _from_sixteen_bits(values)
    if not (low >= 0 and high <= 255):  # NaN too
        raise MediaError(f"32-bit pixels from {low:g} to {high:g} have no known range; convert them to 8 bits")
    scale = 255 if values.dtype.kind == "f" and high <= 1 else 1
    return Image.fromarray(np.rint(values * scale).astype(np.uint8)).convert("RGB")


@contextlib.contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Read a header without Pillow's own, global pixel limit, which only the caller of Pillow may set.

    Nothing is decoded in here; `_decode` checks the size against the limit that was asked for.
    """
    with _PILLOW_LIMIT:
        kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = kept


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-30:]}")  # a file's name is at the end


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 200 else f"{text[:200]}..."
