"""Several processes, one schedule: each plans by itself, and each sees that the others planned the same.

Devices of several hosts run one program only if every host sends it. A host that sends something else would leave all
devices waiting for each other for good. So each process publishes a digest of each plan, and sends none before it has
seen that the others' digests are the same: what differs stops the job with words. The devices need not wait for that,
since a step is planned while they run the one before.
"""

import hashlib
import threading
from collections.abc import Sequence

from aphrodite_jax.engine.scheduler import Chunk, Plan
from aphrodite_jax.errors import LockstepError
from aphrodite_jax.executor.processes import Store

__all__ = ["Lockstep"]

PATIENCE = 300.0
"""Seconds in which another process must have come to the same step."""
LOOK = 0.5
"""Seconds of one look for a text of the first process."""
DIGEST = 32
"""Characters of a digest that are compared."""
MAX_SUMMARY = 300
"""Characters of a plan that stand in a message."""


class Lockstep:
    """Compares the plans of processes that serve a replica together.

    Args:
      store: of the processes' texts.
      name: of the replica, the same in all of them.
      processes: those that serve it; ``process`` is this one.
      patience: seconds in which another process must have come to the same step.

    Attributes:
      leads: whether this is the first of the processes.
      asked: the highest level of what a process asked for, a stop say; all learn it at the same step.
    """

    def __init__(self, store: Store, name: str, *, processes: Sequence[int], process: int, patience: float = PATIENCE):
        self._store, self._name, self._process, self._patience = store, name, process, patience
        self._others = [other for other in processes if other != process]
        self._first = min(processes)
        self.leads = process == self._first
        self._digest = hashlib.sha256()
        self._step = 0  # of the latest plan that was published; 0 for none
        self._asked, self.asked = 0, 0
        self._num_told = 0

    def ask(self, level: int) -> None:
        """Have ``asked`` be at least ``level`` from the next step on, in all processes."""
        self._asked = max(self._asked, level)

    def told(self, what: str, text: str | None = None, until: threading.Event | None = None) -> str | None:
        """A text of the first process, which gives it, for all; all must ask for the same things in the same order.

        Args:
          until: how long to wait for it, in the place of the usual patience; None is given once it is set.

        Raises:
          LockstepError: the first process does not give it.
        """
        self._num_told += 1
        key = f"aphrodite_jax/{self._name}/told {self._num_told}: {what}"
        if self.leads:
            assert text is not None, "the first process tells"
            self._store.put(key, text)
            return text
        # A thread that waits in the store for long could not be ended with the process.
        found, waited = None, 0.0
        while found is None and (waited < self._patience if until is None else not until.is_set()):
            found = self._store.get(key, min(LOOK, self._patience))
            waited += LOOK
        if found is None and until is None:
            raise LockstepError(self._missed(self._first, what))
        return found

    def compare(self, what: str, text: str) -> None:
        """See that all processes say the same of ``what``, an option of the engine say.

        Raises:
          LockstepError: one says something else, or does not come.
        """
        self._store.put(self._key(what, self._process), text)
        for other in self._others:
            theirs = self._of(other, what)
            if theirs != text:
                raise LockstepError(
                    f"processes of one replica differ in {what}: process {self._process} has {text}, process {other} "
                    f"has {theirs}; start all of them with the same options, files and versions"
                )

    def agree(self, plan: Plan) -> None:
        """Tell the others of a plan, and see that theirs is the same, before its programs are sent.

        Raises:
          LockstepError: it is another, or one of them does not come to it.
        """
        self._add(plan)
        self._step += 1
        what, asked = f"step {self._step}", self._asked
        mine = f"{self._digest.hexdigest()[:DIGEST]} {_summary(plan)}"
        self._store.put(self._key(what, self._process), f"{asked} {mine}")
        for other in self._others:
            level, _, theirs = self._of(other, what).partition(" ")
            asked = max(asked, int(level))
            if theirs != mine:
                raise LockstepError(
                    f"at {what}, process {self._process} planned{mine[DIGEST:]}, and process {other} planned"
                    f"{theirs[DIGEST:]}: all must get the same requests with the same options, in the same order"
                )
        self.asked = max(self.asked, asked)
        if self._step > 1:  # whoever came to this step has read the one before
            self._store.delete(self._key(f"step {self._step - 1}", self._process))

    def _add(self, plan: Plan) -> None:
        """To the digest of all plans so far."""
        for chunk in plan.chunks:
            self._digest.update(_told(chunk).encode())
            if chunk.begin < chunk.sequence.prompt_length:
                self._digest.update(chunk.sequence.prompt.token_ids[chunk.begin : chunk.end].tobytes())
        for item, _ in plan.encode:
            self._digest.update(item.content_hash.encode())
        self._digest.update(plan.num_steps.to_bytes(2))

    def _of(self, other: int, what: str) -> str:
        text = self._store.get(self._key(what, other), self._patience)
        if text is None:
            raise LockstepError(self._missed(other, what))
        return text

    def _missed(self, other: int, what: str) -> str:
        return (
            f"process {other} did not come to {what} within {self._patience:.0f} s of process {self._process}: it has "
            "fewer requests, or hangs; look into its log"
        )

    def _key(self, what: str, process: int) -> str:
        return f"aphrodite_jax/{self._name}/{what}/{process}"


def _told(chunk: Chunk) -> str:
    return f"{chunk.sequence.sequence_id} {chunk.begin}:{chunk.end}; "


def _summary(plan: Plan) -> str:
    text = f"{len(plan.decode)} rows of decode, {len(plan.prefill)} of prompts: {''.join(map(_told, plan.chunks))}"
    return text if len(text) <= MAX_SUMMARY else f"{text[: MAX_SUMMARY - 3]}..."
