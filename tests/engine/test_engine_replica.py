"""Replicas over a model that is a function of the last token: pages that run out, and steps that are cut off."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from aphrodite_jax.engine.admission import prompt_intervals
from aphrodite_jax.engine.replica import Replica
from aphrodite_jax.engine.sequence import MediaItem, PreparedPrompt, Sequence, SequenceStatus
from aphrodite_jax.engine.stats import EngineStats
from aphrodite_jax.inputs import PlaceholderRange
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.outputs import MediaInfo
from aphrodite_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.once

MASKS = {"full": MaskSpec()}
IMAGE = -9
"""A token of the prompt in whose place the runner reads what was encoded."""


def next_token(token, place):
    return (31 * token + 7 * place + 1) % 997


class Runner:
    """The device side: the latest token of each slot, and one number a row of the encoder cache."""

    page_size, vocab_size, context_length, encoder_rows = 16, 997, 400, 4
    buckets = SimpleNamespace(prefill_tokens=(64,))

    def __init__(self, num_pages, num_slots):
        self.num_pages, self.num_slots = num_pages, num_slots
        self.latest = np.zeros(num_slots, np.int64)
        self.encoded = np.zeros(self.encoder_rows, np.int64)
        self.interrupt = None  # by the name of a method, before it does anything

    def _may_be_interrupted(self, name):
        if self.interrupt == name:
            self.interrupt = None
            raise KeyboardInterrupt

    def num_greedy_rows(self, requests):
        return requests

    def num_rows(self, decode, prefill):
        return 0

    def encode(self, items, rows):
        self._may_be_interrupted("encode")
        for item, places in zip(items, rows, strict=True):
            self.encoded[places] = item["pixels"][0]

    def decode(self, slots, places, offsets, pages, num_steps):
        self._may_be_interrupted("decode")
        tokens = np.zeros((num_steps, len(slots)), np.int64)
        for step in range(num_steps):
            for row, (slot, place) in enumerate(zip(slots, places, strict=True)):
                tokens[step, row] = self.latest[slot] = next_token(self.latest[slot], place + step)
        return tokens

    def forward(self, decode, prefill):
        self._may_be_interrupted("forward")
        logits = []
        for rows in (*decode, *prefill):
            token, place = int(rows.token_ids[-1]), rows.start + len(rows) - 1
            if rows.media_rows is not None and rows.media_rows[-1] >= 0:
                token = int(self.encoded[rows.media_rows[-1]])
            logits.append(next_token(self.latest[rows.slot] if token == -1 else token, place))
        return np.array(logits), None, np.zeros(len(prefill), int)

    def sample(self, logits, slots, batch):
        self._may_be_interrupted("sample")
        for slot, token in zip(slots, logits, strict=True):
            if slot < self.num_slots:
                self.latest[slot] = token
        return np.array(logits), None


def sequence(name, token_ids, outputs, pixel=None):
    """Its prompt ends with an image where there is a pixel."""
    token_ids = np.array(token_ids, np.int32)
    media = ()
    if pixel is not None:
        token_ids[-1] = IMAGE
        media = (
            MediaItem(
                modality="image",
                content_hash=f"image {pixel}",
                placeholder=PlaceholderRange(len(token_ids) - 1, 1),
                info=MediaInfo(modality="image", offset=len(token_ids) - 1, num_tokens=1, num_rows=1),
                mm_kwargs={"pixels": np.array([pixel])},
            ),
        )
    intervals = prompt_intervals(MASKS, len(token_ids), {"image": [item.placeholder for item in media]})
    prompt = PreparedPrompt(text=None, token_ids=token_ids, intervals=intervals, media=media)
    return Sequence(
        name,
        prompt,
        SamplingParams(temperature=0.0, ignore_eos=True),
        seed=0,
        mask_specs=MASKS,
        detokenizer=None,
        max_length=len(token_ids) + outputs,
        ends_by_length=True,
    )


def expected(sequence):
    tokens = sequence.prompt.token_ids.tolist()
    if tokens[-1] == IMAGE:
        tokens[-1] = int(sequence.prompt.media[0].mm_kwargs["pixels"][0])
    while len(tokens) < sequence.max_length:
        tokens.append(next_token(tokens[-1], len(tokens) - 1))
    return tokens[sequence.prompt_length :]


def replica_of(runner, **options):
    options = {"max_num_seqs": runner.num_slots, "prefix_caching": True} | options
    return Replica(runner, EngineStats(), end_token_ids=(), **options)


def take_in(replica):
    step, tokens = replica.take_in()
    moved = []
    for chosen in tokens[: step.plan.num_steps]:
        for row, chunk in enumerate(step.plan.chunks):
            if chunk.samples:
                chunk.sequence.num_pending -= 1
                if chunk.sequence.status is not SequenceStatus.FINISHED:
                    chunk.sequence.output_ids.append(int(chosen[row]))
                    moved.append(chunk.sequence)
                    if chunk.sequence.num_known == chunk.sequence.max_length:
                        replica.scheduler.finish(chunk.sequence)
    for sequence in moved:
        replica.scheduler.publish(sequence)


def run(replica, steps=lambda: 8):
    for _ in range(2000):
        if not replica.num_unfinished:
            return
        sent = replica.send(steps())
        while replica.num_sent > (sent is not None):
            take_in(replica)
    pytest.fail("it comes to no end")


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_greedy_answers_are_right_where_pages_run_out(prefix_caching):
    """A preempted sequence of which one row is left to compute has a new slot, and its latest token is not there."""
    preemptions = 0
    for seed in range(100):
        rng = random.Random(seed)
        replica = replica_of(Runner(num_pages=12, num_slots=3), prefix_caching=prefix_caching)
        sequences = [
            sequence(f"{i}/0", [rng.randrange(997) for _ in range(rng.randint(5, 40))], rng.randint(20, 100))
            for i in range(4)
        ]
        for one in sequences:
            replica.scheduler.add(one)
        run(replica, lambda rng=rng: rng.choice([1, 8]))
        for one in sequences:
            assert one.output_ids == expected(one), f"seed {seed}, {one.num_preemptions} preemptions"
            preemptions += one.num_preemptions
    assert preemptions > 50


@pytest.mark.parametrize("interrupted", ["encode", "forward", "sample", "decode"])
def test_who_goes_on_after_an_interrupt_gets_the_whole_answer(interrupted):
    """A step that was not sent is planned anew, its media too."""
    runner = Runner(num_pages=12, num_slots=3)
    replica = replica_of(runner)
    sequences = [sequence(f"{i}/0", [5, 6, 7 + i], 12, pixel=100 + i % 2) for i in range(3)]
    for one in sequences:
        replica.scheduler.add(one)
    if interrupted == "decode":
        for _ in range(2):
            replica.send(2)
    runner.interrupt = interrupted
    with pytest.raises(KeyboardInterrupt):
        replica.send(2)
    run(replica)
    assert [one.output_ids for one in sequences] == [expected(one) for one in sequences]


def test_media_of_a_step_that_was_not_sent_are_encoded_for_the_next_request():
    runner = Runner(num_pages=12, num_slots=3)
    replica = replica_of(runner)
    lost, asked = (sequence(f"{i}/0", [5, 6, 7], 3, pixel=100) for i in range(2))
    replica.scheduler.add(lost)
    runner.interrupt = "encode"
    with pytest.raises(KeyboardInterrupt):
        replica.send(1)
    replica.scheduler.finish(lost)
    replica.scheduler.add(asked)
    run(replica)
    assert asked.output_ids == expected(asked)


def test_an_interrupted_wait_loses_no_token(monkeypatch):
    runner = Runner(num_pages=12, num_slots=3)
    replica = replica_of(runner)
    one = sequence("0/0", [5, 6, 7], 12)
    replica.scheduler.add(one)
    replica.send(1)
    with monkeypatch.context() as patch:
        patch.setattr("jax.device_get", lambda tree: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replica.take_in()
    run(replica)
    assert one.output_ids == expected(one)
