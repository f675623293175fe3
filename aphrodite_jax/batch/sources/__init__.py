"""Inputs of batch jobs: which form a path has, and the source that reads it."""

import importlib
import os
import re
from collections.abc import Sequence

import fsspec
from fsspec.core import url_to_fs

from aphrodite_jax.batch.sources.base import RemoteFile, Row, RowOptions, Source, Unit
from aphrodite_jax.errors import BatchError

__all__ = ["FORMS", "RemoteFile", "Row", "RowOptions", "Source", "Unit", "open_source"]

FORMS = {
    "jsonl": ("aphrodite_jax.batch.sources.jsonl", "JsonlSource"),
    "folder": ("aphrodite_jax.batch.sources.folder", "FolderSource"),
    "parquet": ("aphrodite_jax.batch.sources.parquet", "ParquetSource"),
    "datasets": ("aphrodite_jax.batch.sources.datasets_folder", "DatasetsSource"),
    "webdataset": ("aphrodite_jax.batch.sources.webdataset", "WebDatasetSource"),
}
"""Form to the module and class that reads it, which are imported when they are used."""

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "folder": IMAGE_SUFFIXES,
}
_SAVED_DATASET = {"dataset_dict.json", "state.json"}  # of `datasets.save_to_disk`: of several splits, of one


def open_source(path: str | os.PathLike, options: RowOptions, form: str | None = None) -> Source:
    """The source that reads an input.

    Args:
      path: a file, a folder, or a pattern of files; local, or any address that `fsspec` opens.
      form: "jsonl", "folder", "parquet", "datasets" or "webdataset"; found by what ``path`` is if None.

    Raises:
      BatchError: there is no such input, its form is not clear, or it can't be read.
    """
    path = os.fspath(path)
    if form is not None and form not in FORMS:
        raise BatchError(f"format {form!r} is not known; there are {', '.join(FORMS)}")
    module, name = FORMS[form or _form_of(path)]
    return getattr(importlib.import_module(module), name)(path, options)


def _form_of(path: str) -> str:
    """The form of an input by its name, or by what is in it if it is a folder."""
    how = "give --format"
    if found := _forms_of_names([re.split(r"[?#]", path)[0].rstrip("/")], folder=False):
        return found[0]
    try:
        filesystem, place = url_to_fs(path)
        if not filesystem.exists(place):
            raise BatchError(f"there is no input {path!r}")
        if not filesystem.isdir(place):
            known = ", ".join(suffix for form in ("jsonl", "parquet", "webdataset") for suffix in _SUFFIXES[form])
            raise BatchError(f"the form of the input {path!r} is not clear: its name ends in none of {known}; {how}")
        names = _names_in(filesystem, place)
    except (OSError, ValueError, ImportError) as error:
        raise BatchError(f"can't read the input {path!r}: {error}") from error
    found = _forms_of_names(names, folder=True)
    if not found:
        raise BatchError(f"the folder {path!r} has no file of a known form in it: {', '.join(FORMS)}")
    if len(found) > 1:
        raise BatchError(f"the folder {path!r} has files of several forms, {' and '.join(found)}; {how}")
    return found[0]


def _names_in(filesystem: fsspec.AbstractFileSystem, place: str) -> list[str]:
    """Names of files in a folder, from the highest level that has files of a form."""
    for _, _, files in filesystem.walk(place):
        if _forms_of_names(list(files), folder=True):
            return list(files)
    return []


def _forms_of_names(names: Sequence[str], *, folder: bool) -> list[str]:
    if folder and _SAVED_DATASET & set(names):
        return ["datasets"]
    lower = [name.lower() for name in names]
    forms = [form for form, suffixes in _SUFFIXES.items() if any(name.endswith(suffixes) for name in lower)]
    return forms if folder else [form for form in forms if form != "folder"]
