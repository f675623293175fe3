"""Inputs of batch jobs in other forms than JSONL, and how their rows are looked at."""

import io

from PIL import Image

from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.requests import Defaults
from aphrodite_jax.batch.sources import RowOptions


def options(prompt=None, **fields):
    defaults = Defaults(model_names=("tiny",), context_length=64, seed=3)
    return RowOptions(defaults=defaults, prompt=prompt, **fields)


def picture(number):
    """A PNG of a few bytes that is like no other number's."""
    content = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(content, "PNG")
    return content.getvalue()


def read(source, units):
    """All rows of the units, in order."""
    return [row for unit in units for row in source.rows(unit)]


def asked(row):
    """A row's images and its question, or its error's code."""
    if isinstance(row.request, Refusal):
        return row.request.code
    (message,) = (message for message in row.request.source if message["role"] == "user")
    *images, text = message["content"]
    assert {part["type"] for part in images} <= {"image"}
    return [part["image"] for part in images], text["text"]


def check_units(units, rows_per_unit, num_rows):
    """Units number themselves, follow one another, and hold each row once."""
    assert [unit.index for unit in units] == list(range(len(units)))
    row = 0
    for unit in units:
        assert unit.first_row == row
        assert unit.num_rows <= rows_per_unit
        assert (unit.error is not None) == (unit.num_rows == 0)
        row += unit.num_rows
    assert row == num_rows


def record(number, name=None, text="an answer"):
    name = str(number) if name is None else name
    counts = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"id": name, "row": number, "text": text, "finish_reason": "stop", **counts}
