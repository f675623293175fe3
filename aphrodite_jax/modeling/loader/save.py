"""A model's weights into a directory in Hugging Face format: the inverse of loading."""

import copy
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import transformers
from flax import nnx

from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.loader.checkpoint_files import INDEX_FILE, SINGLE_FILE
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.loader.parameters import WantedTensor, wanted_tensors
from aphrodite_jax.modeling.loader.safetensors_file import FLOAT_DTYPES, write_file

__all__ = ["save_pretrained"]

WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def save_pretrained(
    model: nnx.Module,
    hf_config: transformers.PretrainedConfig,
    directory: str | os.PathLike,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write ``config.json`` and the weights, in shards with an index if they exceed ``max_shard_bytes``.

    Names are those of the module tree, which is the layout of most files on the hub. Weights keep their
    dtype, and the config's ``dtype`` becomes theirs. Files of an earlier model in ``directory`` are replaced;
    no file is ever half-written, and the config is written last.

    Raises:
      CheckpointError: parameters of no floating-point dtype that the format has, or of other shapes than the config's.
      OSError: the directory can't be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = wanted_tensors(model)
    odd = [name for name, tensor in found.items() if tensor.dtype not in FLOAT_DTYPES.values()]
    if odd:
        raise CheckpointError(f"parameters that are not floating point can't be saved: {', '.join(odd)}")
    _check_shapes(model, hf_config, found)
    files = _shards(found, max_shard_bytes)
    for file, names in files.items():
        described = {name: (found[name].dtype, found[name].shape) for name in names}
        write_file(directory / file, described, lambda name: _array(found[name]))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(map(_num_bytes, found.values()))},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        _write_text(directory / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    else:
        (directory / INDEX_FILE).unlink(missing_ok=True)
    for path in directory.iterdir():
        if WEIGHT_FILES.fullmatch(path.name) and path.name not in files:
            path.unlink()
    _write_text(directory / "config.json", _config_text(model, hf_config, found))


def _check_shapes(model: nnx.Module, hf_config: transformers.PretrainedConfig, found: dict[str, WantedTensor]) -> None:
    """Such shapes no loader would take; over many devices a model has some of its heads several times."""
    expected = wanted_tensors(abstract_model(type(model), hf_config, next(iter(found.values())).dtype))
    for name, tensor in found.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)}, but by the config {list(expected[name].shape)}; a model "
                "that is divided over more devices than it has key and value heads can't be saved: load it on one"
            )


def _shards(found: dict[str, WantedTensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """File to names of its tensors, in the order of the model; a larger tensor has a file of its own."""
    shards, size = [[]], 0
    for name, tensor in found.items():
        num_bytes = _num_bytes(tensor)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, start=1)}


def _num_bytes(tensor: WantedTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _array(tensor: WantedTensor) -> np.ndarray:
    parts = [part.view(np.asarray(part.value)) for part in tensor.parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _config_text(model: nnx.Module, hf_config: transformers.PretrainedConfig, found) -> str:
    config = copy.deepcopy(hf_config)
    dtypes = {tensor.dtype.name for tensor in found.values()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    config.architectures = config.architectures or [type(model).__name__]
    return config.to_json_string(use_diff=True)


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
