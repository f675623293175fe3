"""The scheduler against a device that only remembers: what stands in each slot, and in each encoder row."""

import itertools
from collections import deque

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from aphrodite_jax.engine.admission import prompt_intervals
from aphrodite_jax.engine.block_manager import BlockManager
from aphrodite_jax.engine.encoder_cache import EncoderCache
from aphrodite_jax.engine.scheduler import Scheduler
from aphrodite_jax.engine.sequence import MediaItem, PreparedPrompt, Sequence, SequenceStatus
from aphrodite_jax.errors import RequestError
from aphrodite_jax.inputs import PlaceholderRange
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.outputs import MediaInfo
from aphrodite_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.once

PAGE_SIZE = 4
TILE = 4
BUDGET = 16
MAX_TOKENS = 40  # of a sequence; the pages hold at least one such
ENCODER_ROWS = 10
MASKS = {
    "causal": {"full": MaskSpec()},
    "spans": {"full": MaskSpec(bidirectional=("image",)), "sliding": MaskSpec(window=5)},
    "prefix": {"full": MaskSpec(prefix=True)},
}


def sequence(name, length, media=(), masks="causal", *, tokens=None, outputs=MAX_TOKENS, ends_by_length=False):
    """``media``: content hash, offset and rows of each item; ``tokens`` are those of nobody else by default."""
    items = tuple(
        MediaItem(
            modality="image",
            content_hash=h,
            placeholder=PlaceholderRange(offset, rows),
            info=MediaInfo(modality="image", offset=offset, num_tokens=rows, num_rows=rows),
        )
        for h, offset, rows in media
    )
    ranges = {"image": [item.placeholder for item in items]}
    prompt = PreparedPrompt(
        text=None,
        token_ids=np.asarray(tokens if tokens is not None else _own_tokens(length), np.int32),
        intervals=prompt_intervals(MASKS[masks], length, ranges),
        media=items,
    )
    return Sequence(
        name,
        prompt,
        SamplingParams(),
        seed=0,
        mask_specs=MASKS[masks],
        detokenizer=None,
        max_length=length + outputs,
        ends_by_length=ends_by_length,
    )


_token = itertools.count()


def _own_tokens(length):
    return [next(_token) for _ in range(length)]


class Device:
    """Runs plans as the engine does, and checks that all they need is there.

    ``ahead``: steps whose tokens come back late, as with a host that plans while a device runs.
    """

    def __init__(
        self, num_pages=20, max_num_seqs=3, encoder_rows=ENCODER_ROWS, *, ahead=0, max_decode_steps=1, **options
    ):
        self.num_pages, self.max_num_seqs, self.encoder_rows = num_pages, max_num_seqs, encoder_rows
        self.ahead, self.sent, self.max_decode_steps = ahead, deque(), max_decode_steps
        self.scheduler = Scheduler(
            BlockManager(num_pages, PAGE_SIZE),
            EncoderCache(encoder_rows),
            max_num_seqs=max_num_seqs,
            token_budget=BUDGET,
            tile_size=TILE,
            **options,
        )
        self.slots = [None] * (num_pages * PAGE_SIZE)  # what went into the keys and values that stand there
        self.rows = [None] * encoder_rows  # (content hash, row of the item)

    def step(self):
        """One step; the plan, or None where there was none."""
        running = list(self.scheduler.running)
        plan = self.scheduler.schedule(self.max_decode_steps)
        self.check_preempted(running)
        if plan is not None:
            self.run(plan)
            self.scheduler.sent(plan)
            self.sent.append(plan)
        while len(self.sent) > (self.ahead if plan is not None else 0):
            self.take_in(self.sent.popleft())
        return plan

    def run(self, plan):
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks) > 0
        assert len(self.scheduler.running) <= self.max_num_seqs
        places = [seq.slot for seq in self.scheduler.running]
        assert sorted(places) == sorted(set(places))
        assert all(0 <= place < self.max_num_seqs for place in places)
        for item, rows in plan.encode:
            assert len(rows) == item.placeholder.length
            for i, row in enumerate(rows):
                self.rows[row] = (item.content_hash, i)
        assert all(len(chunk) == 1 for chunk in plan.decode)
        assert sum(-(-len(chunk) // TILE) * TILE for chunk in plan.prefill) <= BUDGET
        assert plan.num_steps == 1 or not plan.prefill
        for chunk in plan.chunks:
            self.compute(chunk, plan.num_steps)

    def take_in(self, plan):
        """The tokens of a plan come back; a finished sequence takes none."""
        for _ in range(plan.num_steps):
            for chunk in plan.chunks:
                if chunk.samples:
                    chunk.sequence.num_pending -= 1
                    if chunk.sequence.status is not SequenceStatus.FINISHED:
                        seq = chunk.sequence
                        seq.output_ids.append(self.next_token(seq, seq.num_known))
        for chunk in plan.chunks:
            self.scheduler.publish(chunk.sequence)

    @staticmethod
    def next_token(seq, position):
        """The token that a sequence generates at a position: no two sequences write alike."""
        return 1_000_000 + int(seq.sequence_id.encode().hex(), 16) * 1000 + position

    def check_preempted(self, running):
        preempted = [seq for seq in running if seq not in self.scheduler.running]
        assert preempted == running[len(running) - len(preempted) :]  # those that were let in last
        assert [*self.scheduler.waiting][: len(preempted)] == preempted
        for seq in preempted:
            assert (seq.status, seq.num_computed) == (SequenceStatus.WAITING, 0)
            assert len(self.scheduler.blocks.block_table(seq.sequence_id)) == 0

    def content(self, seq, position):
        """All that decides a row's key and value: what stands before it and which of that it and they saw."""
        generated = range(seq.prompt_length, position + 1)  # some of them are pending, perhaps
        tokens = (*seq.prompt.token_ids[: position + 1].tolist(), *(self.next_token(seq, p) for p in generated))
        seen = tuple(tuple(map(tuple, rows)) for _, rows in sorted(seq.intervals(0, position + 1).items()))
        media = [
            (item.content_hash, item.placeholder.offset)
            for item in seq.prompt.media
            if item.placeholder.offset <= max(position, *(max(rows[1]) - 1 for rows in seen))
        ]
        return tokens, seen, tuple(media)

    def compute(self, chunk, num_steps):
        seq, begin, end = chunk.sequence, chunk.begin, chunk.end + num_steps - 1
        assert seq.status is SequenceStatus.RUNNING
        assert begin == seq.num_computed < end <= seq.max_length
        assert chunk.samples == (chunk.end == len(seq))
        pages = self.scheduler.blocks.block_table(seq.sequence_id)
        slot = [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(end)]
        for position in range(begin, end):
            self.slots[slot[position]] = self.content(seq, position)
        for rows in seq.intervals(begin, end).values():  # every key that a row sees is there
            assert rows.stop.max() <= end
        for position in range(end):
            # Written by whomever: what stands there is what this sequence would write.
            assert self.slots[slot[position]] == self.content(seq, position)
        for item in seq.prompt.media:
            if begin < item.placeholder.stop and item.placeholder.offset < end:
                rows = self.scheduler.encoder_cache.lookup(item.content_hash)
                expected = [(item.content_hash, i) for i in range(item.placeholder.length)]
                assert [self.rows[row] for row in rows] == expected

    def finish(self, seq):
        self.scheduler.finish(seq)
        assert seq.slot == -1
        assert seq.status is SequenceStatus.FINISHED
        assert seq not in self.scheduler.running
        assert seq not in self.scheduler.waiting

    def check_nothing_leaked(self):
        assert self.scheduler.blocks.num_free_pages == self.num_pages
        self.scheduler.blocks.forget_idle()
        self.scheduler.blocks.grow("all pages", self.num_pages * PAGE_SIZE)
        assert sorted(self.scheduler.blocks.block_table("all pages").tolist()) == list(range(self.num_pages))
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert len(self.scheduler.encoder_cache.allocate("all rows", self.encoder_rows)) == self.encoder_rows


@st.composite
def prompts(draw):
    """Arguments of `sequence`, for prompts that are admitted, and the number of its answer's tokens."""
    masks = draw(st.sampled_from(sorted(MASKS)))
    length = draw(st.integers(1, 16) if masks == "prefix" else st.sampled_from([3, 12, 18, 20, 25, 30]))
    media, offset, rows_left = [], 0, ENCODER_ROWS
    for _ in range(draw(st.sampled_from([0, 1, 1, 3]))):
        content_hash = draw(st.sampled_from("pqrst"))
        rows = "pqrst".index(content_hash) * 2 + 1
        offset += draw(st.integers(0, 3))
        if offset + rows > length or rows > rows_left:
            break
        media.append((content_hash, offset, rows))
        offset, rows_left = offset + rows, rows_left - rows
    return (length, tuple(media), masks), draw(st.sampled_from([2, 5, *[MAX_TOKENS - length] * 2]))


@hypothesis.given(
    st.lists(prompts(), min_size=3, max_size=8),
    st.sampled_from([MAX_TOKENS // PAGE_SIZE, 12, 15, 30]),
    st.integers(1, 5),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.data(),
)
@hypothesis.settings(deadline=None, max_examples=120)
def test_everything_is_computed_with_all_it_needs_and_nothing_leaks(
    requests, num_pages, max_num_seqs, ahead, max_decode_steps, prefix_caching, data
):
    """Prompts begin alike, with other media and masks: a page that was wrongly shared would hold another's content."""
    options = dict(ahead=ahead, max_decode_steps=max_decode_steps, prefix_caching=prefix_caching)
    device = Device(num_pages, max_num_seqs, **options)
    waiting_room = [
        sequence(str(i), *prompt, tokens=range(prompt[0]), outputs=num_outputs, ends_by_length=bool(i % 2))
        for i, (prompt, num_outputs) in enumerate(requests)
    ]
    everyone = list(waiting_room)
    aborted = data.draw(st.sets(st.sampled_from(everyone), max_size=2))
    ended_early = data.draw(st.sets(st.sampled_from([seq for seq in everyone if not seq.ends_by_length]), max_size=2))
    alive = set()
    for step in range(10_000):
        if waiting_room and (step % 3 != 2 or not alive):  # requests come while others run
            alive.add(waiting_room[0])
            device.scheduler.add(waiting_room.pop(0))
        plan = device.step()
        if plan is None and not waiting_room and not alive:
            break
        for seq in sorted(alive, key=lambda seq: seq.sequence_id):
            ended = seq.num_known >= seq.max_length or (seq in ended_early and seq.output_ids)
            if ended or (seq in aborted and step % 5 == 4):
                device.finish(seq)
                alive.remove(seq)
    assert not alive
    whole = [seq for seq in everyone if seq not in aborted | ended_early]
    assert all(seq.num_known == seq.max_length and not seq.num_pending for seq in whole)
    device.check_nothing_leaked()


def test_equal_prefixes_are_computed_once_and_other_images_are_not_taken_for_them():
    device = Device(num_pages=40, max_num_seqs=8)
    same = dict(tokens=range(30))

    def computed(name, media):
        seq = sequence(name, 30, media, **same)
        device.scheduler.add(seq)
        begin = None
        while not seq.output_ids:
            chunks = [chunk for chunk in device.step().chunks if chunk.sequence is seq]
            begin = begin if begin is not None or not chunks else chunks[0].begin
        device.finish(seq)
        return begin

    assert computed("a", [("p", 10, 5)]) == 0
    assert computed("b", [("p", 10, 5)]) == 28  # all full pages before the last token
    assert computed("c", [("q", 10, 5)]) == 8  # the pages before the image
    assert computed("d", [("p", 9, 5)]) == 8  # the same image elsewhere
    assert computed("e", [("q", 10, 5)]) == 28
    device.scheduler.blocks.forget_idle()
    assert computed("f", [("p", 10, 5)]) == 0


def test_a_prefix_is_shared_only_up_to_where_no_row_sees_past_it():
    device = Device(num_pages=40)
    for name, begin in (("a", 0), ("b", 4)):  # the span [6, 15) covers the ends of two pages
        seq = sequence(name, 16, [("p", 6, 9)], "spans", tokens=range(16))
        device.scheduler.add(seq)
        assert device.step().chunks[0].begin == begin
        device.finish(seq)
    for length, begin in ((16, 0), (12, 0)):  # rows of a prefix-LM see the whole of their own prompt
        seq = sequence(str(length), length, masks="prefix", tokens=range(length))
        device.scheduler.add(seq)
        assert device.step().chunks[0].begin == begin
        device.finish(seq)


def test_an_image_within_the_shared_prefix_is_not_encoded_again():
    device = Device(num_pages=40)
    for name, encoded in (("a", ["p", "q"]), ("b", ["q"])):
        seq = sequence(name, 16, [("p", 2, 3), ("q", 9, 6)], tokens=range(16))
        device.scheduler.add(seq)
        assert [item.content_hash for item, _ in device.step().encode] == encoded
        device.finish(seq)
        device.scheduler.encoder_cache.discard_unpinned()


def test_several_tokens_at_once_where_nobody_can_end_or_join():
    device = Device(num_pages=40, max_decode_steps=8)
    a, b = (sequence(name, 5, outputs=20, ends_by_length=True) for name in "ab")
    device.scheduler.add(a)
    device.scheduler.add(b)
    device.step()
    assert device.step().num_steps == 8
    assert device.step().num_steps == 8
    assert device.step().num_steps == 3  # 1 + 8 + 8 of 20 tokens were there
    assert a.num_known == b.num_known == 25
    device.finish(a)
    c = sequence("c", 5, outputs=20)
    device.scheduler.add(c)
    device.finish(b)
    assert [device.step().num_steps for _ in range(3)] == [1, 1, 1]  # c may end at any token


def test_a_step_has_rows_of_decode_and_chunks_of_prompts():
    device = Device(num_pages=40)
    a, b = sequence("a", 5), sequence("b", 30)
    device.scheduler.add(a)
    device.step()
    device.scheduler.add(b)
    plan = device.step()
    assert [chunk.sequence for chunk in plan.decode] == [a]
    assert [(chunk.sequence, chunk.begin, chunk.end) for chunk in plan.prefill] == [(b, 0, 16)]


def test_chunks_end_where_no_row_sees_past_them():
    device = Device(encoder_rows=14)
    device.scheduler.add(sequence("a", 30, [("p", 3, 9), ("q", 14, 5)], "spans"))
    ends = [[chunk.end for chunk in device.step().chunks] for _ in range(3)]
    assert ends == [[14], [30], [31]]  # 16 would cut the second span
    assert device.scheduler.running[0].num_computed == 31


def test_chunks_take_whole_tiles_of_the_budget_in_the_order_of_arrival():
    device = Device(max_num_seqs=8)
    for name, length in (("a", 5), ("b", 9), ("c", 3)):
        device.scheduler.add(sequence(name, length))
    plan = device.step()
    assert [(chunk.sequence.sequence_id, chunk.end) for chunk in plan.chunks] == [("a", 5), ("b", 8)]
    plan = device.step()
    # a generates, the last row of b is one row too, and c begins
    assert [(chunk.sequence.sequence_id, chunk.begin, chunk.end) for chunk in plan.decode] == [("a", 5, 6), ("b", 8, 9)]
    assert [(chunk.sequence.sequence_id, chunk.begin, chunk.end) for chunk in plan.prefill] == [("c", 0, 3)]
    plan = device.step()
    assert [chunk.end for chunk in plan.decode] == [7, 10, 4]
    assert not plan.prefill
    device = Device()
    for name, length in (("a", 5), ("b", 2), ("c", 9)):  # tiles of 4: 8 + 4 rows of the budget, and 4 are left
        device.scheduler.add(sequence(name, length))
    assert [chunk.end for chunk in device.step().chunks] == [5, 2, 4]


def test_a_run_of_rows_that_no_step_can_hold_is_refused():
    scheduler = Device().scheduler
    scheduler.add(sequence("a", 30, [("p", 2, 16)], "spans"))
    scheduler.add(sequence("b", 16, masks="prefix"))
    for seq in (sequence("c", 30, [("p", 2, 17)], "spans"), sequence("d", 17, masks="prefix")):
        with pytest.raises(RequestError, match=r"17 rows .* max_num_batched_tokens allows 16: raise it"):
            scheduler.add(seq)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_the_last_to_come_gives_up_its_pages_and_is_computed_again(prefix_caching):
    device = Device(num_pages=5, prefix_caching=prefix_caching)
    a, b = sequence("a", 7), sequence("b", 4)
    device.scheduler.add(a)
    device.scheduler.add(b)
    device.step()
    assert device.scheduler.running == [a, b]
    while not device.scheduler.num_preemptions:
        device.step()
    assert device.scheduler.running == [a]
    assert (b.status, b.num_computed, b.num_preemptions) == (SequenceStatus.WAITING, 0, 1)
    outputs = len(b.output_ids)
    assert outputs > 0
    device.finish(a)
    plan = device.step()
    kept = (4 + outputs - 1) // PAGE_SIZE * PAGE_SIZE if prefix_caching else 0  # nobody needed its pages meanwhile
    assert [(chunk.begin, chunk.end) for chunk in plan.chunks] == [(kept, 4 + outputs)]
    assert len(b.output_ids) == outputs + 1
    device.finish(b)
    device.check_nothing_leaked()


def test_a_sequence_waits_where_it_would_take_the_page_that_another_needs_next():
    for num_pages, running in ((3, ["a"]), (4, ["a", "b"])):
        device = Device(num_pages)
        device.scheduler.add(sequence("a", 8))
        device.scheduler.add(sequence("b", 4))
        device.step()
        assert [seq.sequence_id for seq in device.scheduler.running] == running


def test_media_of_a_running_prompt_stay_and_others_wait_for_room():
    device = Device()
    a = sequence("a", 30, [("p", 20, 10)])
    b = sequence("b", 12, [("q", 0, 6)])
    c = sequence("c", 12, [("p", 0, 10)])
    for seq in (a, b, c):
        device.scheduler.add(seq)
    plan = device.step()
    assert [item.content_hash for item, _ in plan.encode] == ["p"]
    assert device.scheduler.running == [a]
    device.step()  # the end of a's prompt; b came too late to evict p in this step
    assert device.scheduler.running == [a]
    plan = device.step()
    assert [item.content_hash for item, _ in plan.encode] == ["q"]
    assert device.scheduler.encoder_cache.lookup("p") is None
    assert device.scheduler.running == [a, b]
    plan = device.step()
    assert [item.content_hash for item, _ in plan.encode] == ["p"]
    assert device.scheduler.running == [a, b, c]


def test_a_prompt_whose_media_fit_in_part_keeps_nothing_while_it_waits():
    device = Device()
    device.scheduler.add(sequence("a", 20, [("p", 0, 6)]))
    device.scheduler.add(sequence("b", 8, [("q", 0, 3), ("r", 4, 5)]))
    device.step()
    plan = device.step()  # there is room for b's rows, but not for r beside p
    assert [chunk.sequence.sequence_id for chunk in plan.chunks] == ["a"]
    assert device.scheduler.encoder_cache.lookup("q") is None
    assert len(device.scheduler.blocks.block_table("b")) == 0
    plan = device.step()
    assert [chunk.sequence.sequence_id for chunk in plan.prefill] == ["b"]
    assert [item.content_hash for item, _ in plan.encode] == ["q", "r"]


def test_one_item_in_two_prompts_and_twice_in_one_is_encoded_once():
    device = Device()
    device.scheduler.add(sequence("a", 8, [("p", 0, 2), ("p", 4, 2)]))
    device.scheduler.add(sequence("b", 6, [("p", 1, 2)]))
    plan = device.step()
    assert [chunk.sequence.sequence_id for chunk in plan.chunks] == ["a", "b"]
    assert [item.content_hash for item, _ in plan.encode] == ["p"]


def test_finish_frees_a_waiting_and_a_half_computed_sequence_and_can_be_repeated():
    device = Device(max_num_seqs=1)
    a, b = sequence("a", 30, [("p", 2, 10)]), sequence("b", 30)
    device.scheduler.add(a)
    device.scheduler.add(b)
    device.step()
    assert 0 < a.num_computed < 30
    for seq in (b, a, a):
        device.finish(seq)
    assert device.step() is None
    device.check_nothing_leaked()
