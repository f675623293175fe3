import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aphrodite_jax.engine.block_manager import BlockManager

NUM_PAGES = 7
PAGE_SIZE = 4

ids = st.sampled_from(["a", "b", "c"])


class Pages(RuleBasedStateMachine):
    """Against the plainest model: how many pages each sequence should hold."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(NUM_PAGES, PAGE_SIZE)
        self.expected = {}  # sequence to its pages, as seen when they were given
        self.views = []  # tables given out, and what they held then

    def need(self, sequence_id, num_tokens):
        return max(0, -(-num_tokens // PAGE_SIZE) - len(self.expected.get(sequence_id, [])))

    def free_pages(self):
        return NUM_PAGES - sum(map(len, self.expected.values()))

    @rule(sequence_id=ids, num_tokens=st.integers(0, PAGE_SIZE * (NUM_PAGES + 1)))
    def grow(self, sequence_id, num_tokens):
        before, need = self.expected.get(sequence_id, []), self.need(sequence_id, num_tokens)
        fits = need <= self.free_pages()
        assert self.blocks.can_allocate(sequence_id, num_tokens) is fits
        if not fits:
            with pytest.raises(ValueError, match=f"{sequence_id} lacks {need} pages .* {self.free_pages()} are free"):
                self.blocks.grow(sequence_id, num_tokens)
            assert self.blocks.block_table(sequence_id).tolist() == before
            return
        self.blocks.grow(sequence_id, num_tokens)
        table = self.blocks.block_table(sequence_id)
        assert table[: len(before)].tolist() == before
        assert len(table) == len(before) + need
        self.expected[sequence_id] = table.tolist()
        self.views.append((table, table.tolist()))

    @rule(sequence_id=ids)
    def free(self, sequence_id):
        self.blocks.free(sequence_id)
        self.expected.pop(sequence_id, None)
        assert len(self.blocks.block_table(sequence_id)) == 0

    @precondition(lambda self: self.expected)
    @rule()
    def free_all(self):
        for sequence_id in list(self.expected):
            self.free(sequence_id)
        assert self.blocks.num_free_pages == NUM_PAGES

    @invariant()
    def each_page_is_free_or_held_by_one(self):
        held = [page for pages in self.expected.values() for page in pages]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(NUM_PAGES))
        assert self.blocks.num_free_pages == self.free_pages()

    @invariant()
    def tables_are_the_sequences_own_and_never_change(self):
        for sequence_id, pages in self.expected.items():
            table = self.blocks.block_table(sequence_id)
            assert table.dtype == np.int32
            assert table.tolist() == pages
        assert all(view.tolist() == pages for view, pages in self.views)


Pages.TestCase.settings = hypothesis.settings(deadline=None, max_examples=60, stateful_step_count=30)
TestPages = Pages.TestCase


def test_a_table_can_not_be_written_to():
    blocks = BlockManager(3, 2)
    blocks.grow("a", 3)
    with pytest.raises(ValueError, match="read-only"):
        blocks.block_table("a")[0] = 9
    blocks.grow("a", 5)  # the manager itself still can
    assert sorted(blocks.block_table("a").tolist()) == [0, 1, 2]


def test_every_page_can_be_had_and_none_twice():
    blocks = BlockManager(1000, 1)
    for num_tokens in range(1, 1001):
        blocks.grow("a", num_tokens)
    assert sorted(blocks.block_table("a").tolist()) == list(range(1000))
    assert not blocks.can_allocate("b", 1)
    assert blocks.can_allocate("b", 0)
    assert blocks.page_size == 1
