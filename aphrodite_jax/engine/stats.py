"""What an engine has done so far: counts, and times as histograms, so that memory does not grow with requests."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["EngineStats", "Times"]

LEAST, PER_DECADE, DECADES = 1e-5, 20, 9


class Times:
    """A histogram of times in seconds: from 10 microseconds to hours, in steps of 12%."""

    def __init__(self):
        self.count, self.total, self.largest = 0, 0.0, 0.0
        self._counts = np.zeros(PER_DECADE * DECADES, np.int64)

    def add(self, seconds: float) -> None:
        """Count one time."""
        self.count, self.total, self.largest = self.count + 1, self.total + seconds, max(self.largest, seconds)
        bucket = math.ceil(PER_DECADE * math.log10(max(seconds, LEAST) / LEAST))
        self._counts[min(bucket, len(self._counts) - 1)] += 1

    def quantile(self, share: float) -> float:
        """Seconds that a ``share`` of the times does not exceed, up to 12% too high; 0 where there are none."""
        if not self.count:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self._counts), math.ceil(share * self.count)))
        return min(LEAST * 10 ** (bucket / PER_DECADE), self.largest)

    def summary(self) -> dict[str, float]:
        """Mean, median, 99th percentile and maximum, in seconds, and their number."""
        mean = self.total / self.count if self.count else 0.0
        return {
            "count": self.count,
            "mean": mean,
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "max": self.largest,
        }


@dataclasses.dataclass(kw_only=True)
class EngineStats:
    """Counts since the engine began.

    Attributes:
      requests, finished: taken in, and ended in any way.
      prompt_tokens: of all sequences that began to run, again when they were preempted.
      prompt_tokens_computed: of these, those that no page held already.
      output_tokens: that came back.
      media_items, media_encoded: items of sequences that began to run, and those that had to be encoded.
      media_values, media_padding: numbers in the pixels of media that were encoded, and those that filled shapes up: a
        share of the vision tower's work.
      steps, decode_steps: programs sent, and tokens of each request that their decode parts made.
      rows, padded_rows: rows of the programs that were a token's, and those that filled buckets up.
      plan, wait, step: seconds in which the host planned and prepared, waited for the device, and both together.
      time_to_first_token, time_between_tokens: seconds, of each request and of each token after the first. A request
        counts from `AphroditeEngine.add_request`, or from `add_prepared`, when its preparation is over.
    """

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    prompt_tokens_computed: int = 0
    output_tokens: int = 0
    media_items: int = 0
    media_encoded: int = 0
    media_values: int = 0
    media_padding: int = 0
    steps: int = 0
    decode_steps: int = 0
    rows: int = 0
    padded_rows: int = 0
    plan: float = 0.0
    wait: float = 0.0
    step: float = 0.0
    time_to_first_token: Times = dataclasses.field(default_factory=Times)
    time_between_tokens: Times = dataclasses.field(default_factory=Times)

    def as_dict(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values by name, and ``others`` after them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x.summary() if isinstance(x, Times) else x for name, x in values.items()} | dict(others)


clock = time.perf_counter
"""Seconds, for all times above."""
