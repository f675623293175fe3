"""Processes that serve one model together do the same parts, row for row; the first of them keeps the output.

It takes units and keeps their journals, and tells the others which units it took and which of their rows have come to
their end already. They keep journals of their own, in files that nobody sees, so that all count alike.
"""

import dataclasses
import json
import tempfile
import threading
from collections.abc import Container

from aphrodite_jax.batch.answers import json_line
from aphrodite_jax.batch.journal import OpenUnit
from aphrodite_jax.batch.output import OutputFile, OutputHeld
from aphrodite_jax.batch.parts import PartsJob, Standing
from aphrodite_jax.batch.sources import Unit
from aphrodite_jax.engine.lockstep import Lockstep

__all__ = ["LEAVE", "STOP", "Company"]

STOP, LEAVE = 1, 2
"""What one process may ask of all: to begin no new rows, and to leave those that run."""
HELD, DONE = "held", "done"


class Company:
    """A job's output, and requests to stop, as processes see them that work together.

    Args:
      job: whose units are done.
      lockstep: of the engine; None for a process that is alone.
    """

    def __init__(self, job: PartsJob, lockstep: Lockstep | None):
        self._job, self._lockstep = job, lockstep
        self._asked = 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others, and what is done may hang on the clock and on threads."""
        return self._lockstep is None

    @property
    def leads(self) -> bool:
        """Whether this process keeps the output."""
        return self._lockstep is None or self._lockstep.leads

    @property
    def asked(self) -> int:
        """`STOP` or `LEAVE` once a process asked for it, as all of them see it; 0 before."""
        return self._asked if self._lockstep is None else self._lockstep.asked

    def ask(self, what: int) -> None:
        """Ask all processes for `STOP` or `LEAVE`."""
        self._asked = max(self._asked, what)
        if self._lockstep is not None:
            self._lockstep.ask(what)

    def standing(self, indices: Container[int] | None) -> Standing:
        """`PartsJob.standing` as the first process sees it."""
        if self._lockstep is None:
            return self._job.standing(indices)
        text = None
        if self.leads:
            standing = self._job.standing(indices)
            text = json.dumps({**dataclasses.asdict(standing), "done": sorted(standing.done)})
        value = json.loads(self._lockstep.told("standing", text) or "")
        return Standing(**{**value, "done": set(value["done"])})

    def take(self, unit: Unit, until: threading.Event) -> OpenUnit | None:
        """`PartsJob.take`, as the first process does it.

        Args:
          until: the first process may come to the unit late, since they read ahead of what they answer; once this is
            set nobody waits for it any more.

        Raises:
          OutputHeld: another run works on it, or ``until`` is set.
        """
        if self._lockstep is None:
            return self._job.take(unit)
        what, text, work = f"part {unit.index}", None, None
        if self.leads:
            try:
                work = self._job.take(unit)
                text = DONE if work is None else json.dumps(list(work.settled()))
            except OutputHeld:
                text = HELD
        text = self._lockstep.told(what, text, until)
        if text is None or text == HELD:
            raise OutputHeld(f"part {unit.index} of {self._job.place}")
        if text == DONE or self.leads:
            return work
        return _shadow(unit, json.loads(text))

    def put_in_place(self, work: OpenUnit) -> None:
        """`PartsJob.put_in_place`, by the first process alone."""
        if self.leads:
            self._job.put_in_place(work)
        else:
            work.close()

    def keep(self, work: OpenUnit) -> None:
        """`PartsJob.keep`, by the first process alone."""
        if self.leads:
            self._job.keep(work)
        else:
            work.close()


def _shadow(unit: Unit, settled: list[tuple[int, bool]]) -> OpenUnit:
    """A unit whose journal goes nowhere, with rows that have come to their end."""
    file = tempfile.NamedTemporaryFile(prefix="aphrodite-journal-")  # noqa: SIM115 - closed with the unit
    for number, answered in settled:
        file.write(json_line({"row": number, "record" if answered else "failure": {}}))
    file.flush()
    return OpenUnit(unit, OutputFile(file.fileno(), file.name, created=True), file.close)
