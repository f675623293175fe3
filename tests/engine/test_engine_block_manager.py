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


class SharedPages(RuleBasedStateMachine):
    """Sequences are strings of letters, a page of them has the whole string up to its end as its key.

    What a page holds is written when its holder grows, so a page that is taken while somebody needs it shows.
    """

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(NUM_PAGES, 1)
        self.texts = {}
        self.content = [None] * NUM_PAGES

    def keys(self, text):
        return [text[: i + 1].encode() for i in range(len(text))]

    @rule(sequence_id=ids, text=st.text("xy", min_size=1, max_size=5))
    def begin(self, sequence_id, text):
        self.blocks.free(sequence_id)
        self.texts.pop(sequence_id, None)
        keys = self.keys(text)
        keys = keys[: self.blocks.known(keys)]
        if not self.blocks.can_share(keys, len(text)):
            self.blocks.share(sequence_id, keys)
            with pytest.raises(ValueError, match="lacks"):
                self.blocks.grow(sequence_id, len(text))
            self.blocks.free(sequence_id)
            return
        self.blocks.share(sequence_id, keys)
        assert self.blocks.grow(sequence_id, len(text)) == len(text) - len(keys)
        for index in range(len(keys), len(text)):
            self.content[self.blocks.block_table(sequence_id)[index]] = text[: index + 1]
        self.texts[sequence_id] = text

    @rule(sequence_id=ids)
    def publish(self, sequence_id):
        text = self.texts.get(sequence_id, "")
        for index, key in enumerate(self.keys(text)):
            self.blocks.publish(sequence_id, index, key)
        assert self.blocks.known(self.keys(text)) == len(text)

    @rule(sequence_id=ids)
    def free(self, sequence_id):
        self.blocks.free(sequence_id)
        self.texts.pop(sequence_id, None)

    @rule()
    def forget_idle(self):
        self.blocks.forget_idle()

    @invariant()
    def every_page_holds_what_its_holders_need(self):
        held = set()
        for sequence_id, text in self.texts.items():
            table = self.blocks.block_table(sequence_id).tolist()
            assert [self.content[page] for page in table] == [text[: i + 1] for i in range(len(text))]
            held.update(table)
        assert self.blocks.num_free_pages == NUM_PAGES - len(held)


SharedPages.TestCase.settings = hypothesis.settings(deadline=None, max_examples=80, stateful_step_count=30)
TestSharedPages = SharedPages.TestCase


def test_pages_that_nobody_holds_go_in_the_order_in_which_they_were_let_go():
    blocks = BlockManager(4, 1)
    for name in "ab":
        blocks.grow(name, 2)
        blocks.publish(name, 0, name.encode())
        blocks.publish(name, 1, f"{name}2".encode())
    blocks.free("a")
    blocks.free("b")
    blocks.share("c", [b"a"])  # a use: now b is older
    blocks.free("c")
    blocks.grow("d", 3)
    assert blocks.known([b"a", b"a2"]) == 1
    assert blocks.known([b"b"]) == blocks.known([b"b2"]) == 0


def test_sharing_what_is_not_known_or_on_top_of_pages_is_an_error():
    blocks = BlockManager(4, 1)
    blocks.grow("a", 1)
    blocks.publish("a", 0, b"k")
    with pytest.raises(ValueError, match=r"of the 2 keys .* some are not known"):
        blocks.share("b", [b"k", b"l"])
    blocks.grow("b", 1)
    with pytest.raises(ValueError, match="holds pages already"):
        blocks.share("b", [b"k"])


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
