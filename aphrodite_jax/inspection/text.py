"""An explanation as text."""

import itertools
import textwrap

import numpy as np

from aphrodite_jax.inspection.explanation import ExplainedItem, Explanation
from kernels_pallas.intervals import RowIntervals

__all__ = ["explanation_text", "item_line", "mask_line", "summary_lines"]


def explanation_text(told: Explanation, width: int = 100) -> str:
    """All of it, for a terminal."""
    lines = [*summary_lines(told), *(item_line(index, item) for index, item in enumerate(told.items))]
    lines += [mask_line(kind, rows) for kind, rows in told.intervals.items()]
    runs = (
        f"{text!r}" + (f" x {count}" if count > 1 else "")
        for text, count in ((text, len(list(same))) for text, same in itertools.groupby(told.tokens))
    )
    return "\n".join(
        [*lines, "tokens:", *textwrap.wrap(" ".join(runs), width, initial_indent="  ", subsequent_indent="  ")]
    )


def summary_lines(told: Explanation) -> list[str]:
    """How many tokens, what of them is computed, and in how many steps."""
    total = len(told.tokens)
    of_media = sum(item.info.num_tokens for item in told.items)
    steps = ", ".join(f"[{begin}, {end})" for begin, end in told.chunks)
    cached = told.num_cached // told.page_size
    return [
        f"{total} tokens: {total - of_media} of text, {of_media} of {len(told.items)} media items",
        f"prefill in {len(told.chunks)} step{'s' * (len(told.chunks) > 1)}: {steps}"
        + (f", behind {cached} pages of {told.page_size} tokens that are there already" if cached else ""),
    ]


def item_line(index: int, item: ExplainedItem) -> str:
    """One item."""
    info = item.info
    arrays = ", ".join(f"{name} {array}" for name, array in item.arrays.items()) or "embeddings as they were given"
    frames = "" if info.frame_indices is None else f", frames {list(info.frame_indices)}"
    return (
        f"item {index}: {info.modality}, tokens [{info.offset}, {info.offset + info.num_tokens}), {info.num_rows} rows "
        f"of {arrays}{frames}, {'encoded already' if item.is_encoded else 'not encoded yet'}, {item.content_hash[:12]}"
    )


def mask_line(kind: str, rows: RowIntervals) -> str:
    """What the rows of one mask kind see, in words."""
    place = np.arange(len(rows.start))
    ahead = np.flatnonzero(rows.stop > place + 1)
    widest = int((rows.stop - rows.start).max())
    parts = ["causal" if len(ahead) == 0 else f"rows {_spans(ahead)} see ahead"]
    if (rows.start > 0).any():
        parts.append(f"at most {widest} keys a row")
    return f"mask {kind!r}: " + ", ".join(parts)


def _spans(places: np.ndarray) -> str:
    groups = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return ", ".join(f"[{group[0]}, {group[-1] + 1})" for group in groups)
