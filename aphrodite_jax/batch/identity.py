"""What a model's answers depend on, as plain values that can be written down and compared."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aphrodite_jax.config import ModelConfig

__all__ = ["differences", "model_identity", "model_names"]

_SAMPLED_BYTES = 2**16
"""Read at either end of each file: enough to tell trained weights apart without reading them all."""


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """The model and its options as plain values.

    A directory is known by its files, not by where it stands: names, sizes and the bytes at both ends.
    """
    options = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ("model", "tokenizer", "revision")
    }
    sources = {"checkpoint": _source(config.model, config.revision)}
    if config.tokenizer != config.model:
        sources["tokenizer"] = _source(config.tokenizer, config.revision)
    return {**sources, **options}


def model_names(config: ModelConfig, served: tuple[str, ...]) -> tuple[str, ...]:
    """The names by which lines may ask for the model; answers carry the first.

    ``served`` come first, then the directory's own name or the hub id, then the path as it was given.
    """
    own = Path(config.model).resolve().name if config.is_local else config.model
    return tuple(dict.fromkeys([*served, own, config.model]))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted names of the values that differ between two nests of dicts."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            difference
            for key in sorted({*one, *other})
            for difference in differences(one.get(key), other.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if one == other else [where]


def _source(model: str, revision: str | None) -> str:
    path = Path(model)
    if not path.is_dir():
        return f"{model}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(_SAMPLED_BYTES, file.stat().st_size - _SAMPLED_BYTES), os.SEEK_SET)
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
