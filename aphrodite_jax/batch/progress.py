"""The line that tells how a run goes on."""

import sys
import time

import tqdm

from aphrodite_jax.batch.parts import Standing

__all__ = ["Progress"]


class Progress:
    """Rows that came to their end, tokens a second, the time left and failures, on stderr.

    Args:
      standing: of the parts, as the run begins.
      show: whether there is a line at all.
    """

    def __init__(self, standing: Standing, *, show: bool):
        self._began = time.monotonic()
        self._tokens, self._failed = 0, standing.failed
        self._bar = tqdm.tqdm(
            total=standing.rows,
            initial=standing.done_rows,
            unit="row",
            file=sys.stderr,
            disable=not show,
            # A line that is not looked at, but kept in a log, says less.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.__exit__(*error)

    def add(self, rows: int, *, failed: int = 0, tokens: int = 0, resumed: bool = False) -> None:
        """Count rows; ``resumed`` ones are of an earlier run, and say nothing of how fast this one is."""
        self._tokens += tokens
        self._failed += failed
        if self._bar.disable:
            return
        if resumed:
            self._bar.initial += rows
            self._bar.n += rows
            return
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{self._tokens / seconds:.0f} tokens/s, {self._failed} failed", refresh=False)
        self._bar.update(rows)
