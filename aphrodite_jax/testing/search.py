"""The smallest example for which something does not hold, by hypothesis."""

import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import numpy as np
from hypothesis import Phase
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax.multimodal import Video

__all__ = ["Broken", "describe", "search"]

SECONDS_TO_SHRINK = 2.0
"""After which the smallest example so far is told; a program may have to be compiled for each that is tried."""
SLOW_IS_FINE = (hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large)


class Broken(AssertionError):
    """A clause does not hold."""


def search(strategy: st.SearchStrategy, check: Callable[[Any], None], *, most: int) -> None:
    """Raise `Broken` with the smallest of up to ``most`` examples for which ``check`` fails.

    The examples are the same in every run, and others for every function that checks.
    """
    found: dict[str, Any] = {}
    begin = 0.0

    @hypothesis.seed(zlib.crc32(check.__qualname__.encode()))
    @hypothesis.settings(
        max_examples=most,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=SLOW_IS_FINE,
    )
    @hypothesis.given(strategy)
    def test(example):
        nonlocal begin
        if found and time.monotonic() - begin > SECONDS_TO_SHRINK:
            if describe(example) == describe(found["example"]):
                raise found["error"]
            return
        try:
            check(example)
        except Exception as error:
            begin = begin or time.monotonic()
            found.update(example=example, error=error)
            raise

    try:
        test()
    except Exception as error:
        if "error" not in found:
            raise
        reason = found["error"]
        kind = "" if isinstance(reason, Broken) else f"{type(reason).__name__}: "
        raise Broken(f"{kind}{reason}; the smallest example: {describe(found['example'])}") from error


def describe(example: Any) -> str:
    """An example in a few words."""
    if isinstance(example, Mapping):
        return "{" + ", ".join(f"{name}: {describe(value)}" for name, value in example.items()) + "}"
    if isinstance(example, tuple):
        return "(" + ", ".join(map(describe, example)) + ")"
    if isinstance(example, list) and example and not isinstance(example[0], int):
        return "[" + ", ".join(map(describe, example)) + "]"
    if isinstance(example, Image.Image):
        return f"{example.mode} image of {example.width} x {example.height}"
    if isinstance(example, Video):
        frames, height, width, _ = example.frames.shape
        return f"video of {frames} frames of {width} x {height}"
    if isinstance(example, np.ndarray):
        return f"{example.dtype}{list(example.shape)}"
    return repr(example)
