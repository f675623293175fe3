"""Which columns of a table hold a row's images, prompt and name, and what a cell of them is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import types

from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.sources.shards import PROMPT_NAMES
from aphrodite_jax.errors import BatchError

__all__ = ["Columns", "images_of", "pick_columns"]

_IMAGE_NAMES = ("image", "images", "image_path", "image_file", "image_url", "file_name", "path", "url")
"""Names by which a column of strings is taken for paths or URLs of images."""
_ID_NAMES = ("custom_id", "id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that are read; None where rows have none of their own."""

    image: str
    prompt: str | None
    id: str | None

    @property
    def names(self) -> list[str]:
        """Each column once."""
        return list(dict.fromkeys(name for name in (self.image, self.prompt, self.id) if name is not None))


def pick_columns(schema: pa.Schema, given: Mapping[str, str], *, has_prompt: bool, where: str) -> Columns:
    """The columns to read: those that were named, and where none was, the only one that can be meant.

    Args:
      given: names under "image", "prompt" and "id".
      has_prompt: whether the job has a prompt for all rows; a column of prompts counts only if it is named then.
      where: the file, for messages.

    Raises:
      BatchError: a named column that is not there or of the wrong type, or none or several that can be meant.
    """
    kinds = {"image": _is_image, "prompt": _is_text, "id": _is_name}
    for role, name in given.items():
        if schema.names.count(name) != 1:
            raise BatchError(f"{where} has no column {name!r} for {role}; {_listed(schema)}")
        if not kinds[role](schema.field(name).type):
            raise BatchError(f"{where}: column {name!r} can't be {role}, {_WANTED[role]}; {_listed(schema)}")
    prompt = given.get("prompt")
    if prompt is None and not has_prompt:
        prompt = _only([field.name for field in schema if field.name in PROMPT_NAMES and _is_text(field.type)])
        if prompt is None:
            raise BatchError(
                f"it is not clear which column of {where} is the prompt: name it (--prompt-column), or give one "
                f"prompt for all rows (--prompt); {_listed(schema)}"
            )
    image = given.get("image")
    if image is None:
        others = [field for field in schema if field.name not in (prompt, given.get("id"))]
        files = [field.name for field in others if _is_image(field.type) and not _is_text(_item(field.type))]
        paths = [field.name for field in others if field.name in _IMAGE_NAMES and _is_text(_item(field.type))]
        image = _only(files or paths)
        if image is None:
            raise BatchError(
                f"it is not clear which column of {where} is the image: name it (--image-column); {_listed(schema)}"
            )
    own = [field.name for field in schema if field.name in _ID_NAMES and _is_name(field.type)]
    return Columns(
        image=image, prompt=prompt, id=given.get("id") or _only([n for n in own if n not in (image, prompt)])
    )


def images_of(cell: Any, column: str) -> list[bytes | str]:
    """The images of a cell: bytes of a file, or a path or URL.

    Args:
      cell: bytes, a string, ``{"bytes": ..., "path": ...}`` as Hugging Face's Image feature writes, or a list of these.

    Raises:
      Refusal: there is none, or an empty place among several.
    """
    cells = cell if isinstance(cell, list) else [cell]
    if not cells:
        raise Refusal(f"the row has no image: its list in column {column!r} is empty", code="missing_image")
    return [_image_of(one, column) for one in cells]


def _image_of(cell: Any, column: str) -> bytes | str:
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if cell is None or cell == "":
        raise Refusal(f"the row has no image: column {column!r} holds null", code="missing_image")
    return cell


_WANTED = {
    "image": "which is bytes, a path or URL, Hugging Face's struct of bytes and path, or a list of one of these",
    "prompt": "which is text",
    "id": "which is text or a whole number",
}


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _listed(schema: pa.Schema) -> str:
    fields = [f"{field.name} ({field.type})" for field in schema]
    return "it has " + ", ".join(fields[:20]) + (f" and {len(fields) - 20} more" if len(fields) > 20 else "")


def _item(kind: pa.DataType) -> pa.DataType:
    """The type of a list's items, and of a dictionary's values."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif types.is_dictionary(kind) or _is_list(kind):
            kind = kind.value_type
        else:
            return kind


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_image(kind: pa.DataType) -> bool:
    item = _item(kind)
    if types.is_struct(item):
        fields = {field.name: field.type for field in item}
        return _is_bytes(fields.get("bytes")) or _is_text(fields.get("path"))
    return _is_bytes(item) or _is_text(item)


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_null(kind):  # so a column is written that holds nothing in this file
        return True
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or types.is_integer(kind)
