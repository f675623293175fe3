"""Safetensors files: ours against the reference library's, and every way in which they can be broken."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import uniform

from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.loader import safetensors_file
from aphrodite_jax.modeling.loader.safetensors_file import read_blocks, read_header, write_file

DTYPES = [np.float64, np.float32, np.float16, jnp.bfloat16]
SHAPES = [(), (1,), (7, 5), (3, 4, 2), (0, 4), (4, 0)]


def read(tensor):
    blocks = [block.copy() for _, block in read_blocks(tensor)]
    flat = np.concatenate(blocks) if blocks else np.empty(0, safetensors_file.FLOAT_DTYPES[tensor.dtype])
    return flat.reshape(tensor.shape)


@pytest.fixture
def tensors():
    return {
        f"{np.dtype(dtype).name}.{shape}": np.asarray(uniform(str(shape), shape, 3).astype(dtype))
        for dtype in DTYPES
        for shape in SHAPES
    }


@pytest.mark.parametrize("block_bytes", [1, 24, 2**24])
def test_reads_what_the_library_writes(tmp_path, tensors, monkeypatch, block_bytes):
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", block_bytes)
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    header = read_header(tmp_path / "x.safetensors")
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        assert header[name].shape == tensor.shape
        np.testing.assert_array_equal(read(header[name]), tensor, err_msg=name)


def test_writes_what_the_library_reads(tmp_path, tensors):
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(tmp_path / "x.safetensors", described, tensors.__getitem__)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            if tensor.dtype != jnp.bfloat16:
                np.testing.assert_array_equal(file.get_tensor(name), tensor, err_msg=name)
    header = read_header(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read(header[name]), tensor, err_msg=name)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"old")

    def fail(name):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_file(file, {"a": (np.dtype(np.float32), (2,))}, fail)
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def raw(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not fit in a file of 0"),
        (b"abc", "does not fit in a file of 3"),
        (b"\x80\x02}q\x00(X\x06\x00\x00", "does not fit"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (raw(b"{}", length=2**40), "does not fit"),
        (raw(b"{not json"), "header can't be read"),
        (raw(b"\xff\xfe{}"), "header can't be read"),
        (raw(b"[]"), "header can't be read"),
        (raw({"a": 3}), "header can't be read"),
        (raw({"a": {"dtype": "F32", "shape": [2]}}), "header can't be read"),
        (raw({"a": entry(shape=("x",))}, bytes(8)), "negative or broken"),
        (raw({"a": entry(shape=(-2,))}, bytes(8)), "negative or broken"),
        (raw({"a": entry(end=12)}, bytes(12)), r"F32 of shape \[2\] in 12 bytes"),
        (raw({"a": entry()}, bytes(7)), "its tensors end at byte"),
        (raw({"a": entry()}, bytes(9)), "its tensors end at byte"),
        (raw({"a": entry(begin=4, end=12)}, bytes(12)), "starts at byte"),
        (raw({"a": entry(), "b": entry()}, bytes(8)), "starts at byte"),
    ],
)
def test_damage_is_named(tmp_path, content, reason):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.safetensors is not a whole safetensors file: .*{reason}"):
        read_header(file)


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_truncation_is_named_at_any_length(tmp_path, tensors, cut):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a whole"):
        read_header(file)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(100, np.float32)}, file)
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="became shorter"):
        list(read_blocks(header["a"]))
