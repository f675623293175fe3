"""Processes of one replica see each other's plans, and stop where these differ."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from aphrodite_jax.engine.lockstep import Lockstep
from aphrodite_jax.engine.scheduler import Chunk, Plan
from aphrodite_jax.errors import LockstepError

pytestmark = pytest.mark.once


class Texts:
    """The store of several threads; ``most`` is how many texts it ever held."""

    def __init__(self):
        self.texts, self.changed, self.most = {}, threading.Condition(), 0

    def put(self, name, text):
        with self.changed:
            assert name not in self.texts, "a name is used once"
            self.texts[name] = text
            self.most = max(self.most, len(self.texts))
            self.changed.notify_all()

    def get(self, name, seconds):
        with self.changed:
            self.changed.wait_for(lambda: name in self.texts, seconds)
            return self.texts.get(name)

    def delete(self, name):
        with self.changed:
            del self.texts[name]


def plan(*chunks, images=(), num_steps=1):
    """Of chunks ``(name, begin, end, token)``, whose prompts have 8 tokens of that number."""
    made = []
    for name, begin, end, token in chunks:
        prompt = SimpleNamespace(token_ids=np.full(8, token, np.int32))
        sequence = SimpleNamespace(sequence_id=f"{name}/0", prompt_length=8, prompt=prompt)
        made.append(Chunk(sequence, begin, end, end == 8))
    encode = tuple((SimpleNamespace(content_hash=image), np.arange(2)) for image in images)
    return Plan(decode=(), prefill=tuple(made), encode=encode, num_steps=num_steps)


PLANS = [plan(("a", 0, 8, 5), ("b", 0, 4, 6), images=["dog"]), plan(("b", 4, 8, 6)), plan(("a", 8, 9, 5), num_steps=4)]


def run(*of_processes, texts=None, patience=5.0, ask_at=None):
    """What became of each process: "done", or its error; and what each had been asked for after each step."""
    texts = texts or Texts()

    def process(index):
        lockstep = Lockstep(texts, "r", processes=range(len(of_processes)), process=index, patience=patience)
        asked = []
        for step, planned in enumerate(of_processes[index]):
            if ask_at == (index, step):
                lockstep.ask(2)
            try:
                lockstep.agree(planned)
            except LockstepError as error:
                return str(error), asked
            asked.append(lockstep.asked)
        return "done", asked

    with ThreadPoolExecutor(len(of_processes)) as pool:
        return list(pool.map(process, range(len(of_processes))))


def test_equal_plans_go_on_and_leave_few_texts_behind():
    texts = Texts()
    assert [told for told, _ in run(PLANS * 20, PLANS * 20, PLANS * 20, texts=texts)] == ["done"] * 3
    assert texts.most <= 3 * 3


@pytest.mark.parametrize(
    "other",
    [
        plan(("b", 4, 7, 6)),  # a shorter chunk
        plan(("b", 4, 8, 7)),  # other tokens
        plan(("c", 4, 8, 6)),  # another request
        plan(("b", 4, 8, 6), images=["cat"]),
        plan(("b", 4, 8, 6), num_steps=2),
    ],
)
def test_whoever_plans_something_else_stops_all(other):
    one, two = run(PLANS, [PLANS[0], other, PLANS[2]])
    for (told, _), mine, theirs in ((one, 0, 1), (two, 1, 0)):
        assert told.startswith(f"at step 2, process {mine} planned 0 rows of decode, 1 of prompts: ")
        assert f"and process {theirs} planned 0 rows" in told


def test_an_earlier_difference_is_not_forgotten():
    """A digest is of all plans so far."""
    lockstep = [Lockstep(Texts(), "r", processes=(0,), process=0) for _ in range(2)]
    for one, first in zip(lockstep, (PLANS[0], PLANS[1]), strict=True):
        one.agree(first)
        one.agree(PLANS[2])
    assert lockstep[0]._digest.digest() != lockstep[1]._digest.digest()


def test_a_process_that_ended_early_is_missed():
    begin = time.monotonic()
    (told, _), (other, _) = run(PLANS, PLANS[:2], patience=0.3)
    assert other == "done"
    assert told == (
        "process 1 did not come to step 3 within 0 s of process 0: it has fewer requests, or hangs; look into its log"
    )
    assert time.monotonic() - begin < 5


def test_what_one_asks_for_all_learn_at_the_same_step():
    for ask_at in ((0, 1), (1, 1), (2, 1)):
        assert [asked for _, asked in run(PLANS, PLANS, PLANS, ask_at=ask_at)] == [[0, 2, 2]] * 3


def test_options_that_differ_are_told_before_the_first_step():
    texts = Texts()
    ends = [Lockstep(texts, "r", processes=(0, 1), process=index, patience=5.0) for index in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        equal = [pool.submit(end.compare, "the number of KV pages", "64") for end in ends]
        assert [future.result() for future in equal] == [None, None]
        differ = [pool.submit(end.compare, "jax's version", f"0.{n}") for n, end in enumerate(ends)]
        with pytest.raises(LockstepError, match=r"differ in jax's version: process 0 has 0\.0, process 1 has 0\.1"):
            differ[0].result()
        with pytest.raises(LockstepError, match="process 1 has"):
            differ[1].result()


def test_the_first_process_leads_and_tells():
    texts = Texts()
    first, second = (Lockstep(texts, "r", processes=(2, 3), process=index, patience=0.1) for index in (2, 3))
    assert (first.leads, second.leads) == (True, False)
    with pytest.raises(LockstepError, match="process 2 did not come to the parts within"):
        second.told("the parts")
    first.told("the parts", "too late")
    assert first.told("the parts", "0, 1") == "0, 1"
    assert second.told("the parts") == "0, 1"
