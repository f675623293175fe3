"""Reading and writing safetensors files tensor by tensor.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, a
JSON header of name to dtype, shape and byte range, then the bytes. Tensors are read with plain file reads in
blocks, not through a memory map, whose pages would count as memory of the process as long as it is mapped.
bfloat16 needs no torch.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from aphrodite_jax.errors import CheckpointError

__all__ = ["FLOAT_DTYPES", "StoredTensor", "read_blocks", "read_header", "write_file"]

FLOAT_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The dtypes that parameters may be stored in."""
OTHER_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8,
    "I64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""
BLOCK_BYTES = 16 * 2**20
"""Bytes that are read at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor stands: ``offset`` and ``num_bytes`` within ``file``; ``dtype`` is safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def rows(self, begin: int, end: int) -> "StoredTensor":
        """Those of the first axis from ``begin`` to ``end``, which are one run of bytes."""
        of_row = self.num_bytes // self.shape[0]
        shape, offset = (end - begin, *self.shape[1:]), self.offset + begin * of_row
        return dataclasses.replace(self, shape=shape, offset=offset, num_bytes=(end - begin) * of_row)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name to place of every tensor in ``file``; no tensor is read.

    Raises:
      CheckpointError: the file is not safetensors, or damaged, or shorter than its header says.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        header_bytes = int.from_bytes(start, "little")
        if start == b"version ":
            raise _damaged(file, "it is a Git LFS pointer; fetch the real file with 'git lfs pull'")
        if len(start) < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(file, f"a header of {header_bytes} bytes does not fit in a file of {size}")
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            tensors = {name: _entry(file, fields, offset=8 + header_bytes) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, f"its header can't be read ({error})") from error
    end = 8 + header_bytes
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:
            raise _damaged(file, f"tensor {name!r} starts at byte {tensor.offset}, expected {end}")
        end += tensor.num_bytes
    if end != size:
        raise _damaged(file, f"its tensors end at byte {end}, the file at {size}")
    return tensors


def read_blocks(tensor: StoredTensor) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of the first axis as ``(rows, array)``; the next one overwrites the array.

    A tensor without axes comes as one row.
    """
    if tensor.num_bytes == 0:
        return
    rows, *rest = tensor.shape or (1,)
    step = min(rows, max(1, BLOCK_BYTES // (tensor.num_bytes // rows)))
    buffer = np.empty((step, *rest), FLOAT_DTYPES[tensor.dtype])
    with open(tensor.file, "rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        for first in range(0, rows, step):
            block = buffer[: rows - first]
            _read_into(stream, block.reshape(-1).view(np.uint8).data, tensor.file)
            yield slice(first, first + len(block)), block


def write_file(
    file: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    array: Callable[[str], np.ndarray],
) -> None:
    """Write ``tensors`` (name to dtype and shape), asking ``array`` for one at a time.

    The file stands under its name only when it is whole.
    """
    codes = {dtype: code for code, dtype in FLOAT_DTYPES.items()}
    # Wide dtypes first, then by name: every tensor is aligned to its own dtype, as the reference writer does.
    names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for a format
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                stream.write(np.ascontiguousarray(array(name)).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _entry(file: Path, fields: Mapping, *, offset: int) -> StoredTensor:
    begin, end = fields["data_offsets"]
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    if any(type(value) is not int or value < 0 for value in (begin, end, *shape)):
        raise ValueError(f"negative or broken numbers in {dict(fields)}")
    known = FLOAT_DTYPES[dtype].itemsize if dtype in FLOAT_DTYPES else OTHER_ITEM_SIZES.get(dtype)
    if known is not None and end - begin != known * math.prod(shape):
        raise ValueError(f"{dtype} of shape {list(shape)} in {end - begin} bytes")
    return StoredTensor(file=file, dtype=dtype, shape=shape, offset=offset + begin, num_bytes=end - begin)


def _read_into(stream, view: memoryview, file: Path) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise _damaged(file, "it became shorter while it was read")
        view = view[count:]


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a whole safetensors file: {reason}. Copy or download it again")
