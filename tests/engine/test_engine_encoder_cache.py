from collections import OrderedDict

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aphrodite_jax.engine.encoder_cache import EncoderCache

NUM_ROWS = 12

hashes = st.sampled_from(list("abcdef"))
users = st.sampled_from(["u", "v", "w"])


class Cache(RuleBasedStateMachine):
    """Against a model that keeps one list in the order of last use, and the set of pins."""

    def __init__(self):
        super().__init__()
        self.cache = EncoderCache(NUM_ROWS)
        self.rows = OrderedDict()  # hash to its rows, the least recently used first
        self.pins = set()  # (hash, user)

    def pinned(self, content_hash):
        return any(content_hash == h for h, _ in self.pins)

    def used(self):
        return sum(map(len, self.rows.values()))

    @rule(content_hash=hashes)
    def lookup(self, content_hash):
        rows = self.cache.lookup(content_hash)
        if content_hash not in self.rows:
            assert rows is None
            return
        assert rows.dtype == np.int32
        assert rows.tolist() == self.rows[content_hash]
        self.rows.move_to_end(content_hash)

    @rule(content_hash=hashes, num_rows=st.integers(0, NUM_ROWS + 1))
    def allocate(self, content_hash, num_rows):
        if content_hash in self.rows:
            with pytest.raises(ValueError, match=f"{content_hash} has rows already"):
                self.cache.allocate(content_hash, num_rows)
            return
        rows = self.cache.allocate(content_hash, num_rows)
        unpinned = [h for h in self.rows if not self.pinned(h)]
        if num_rows > NUM_ROWS - self.used() + sum(len(self.rows[h]) for h in unpinned):
            assert rows is None  # and by the invariants nothing was evicted
            return
        while NUM_ROWS - self.used() < num_rows:
            del self.rows[unpinned.pop(0)]
        assert len(rows) == num_rows
        self.rows[content_hash] = rows.tolist()

    @rule(content_hash=hashes, user=users)
    def pin(self, content_hash, user):
        if content_hash in self.rows:
            self.cache.pin(content_hash, user)
            self.pins.add((content_hash, user))
        else:
            with pytest.raises(ValueError, match="no rows to pin"):
                self.cache.pin(content_hash, user)

    @rule(user=users)
    def unpin(self, user):
        self.cache.unpin(user)
        mine = {h for h, u in self.pins if u == user}
        self.pins = {(h, u) for h, u in self.pins if u != user}
        for content_hash in sorted(mine):  # to let go is the last use
            if not self.pinned(content_hash):
                self.rows.move_to_end(content_hash)

    @rule(content_hash=hashes)
    def discard(self, content_hash):
        if content_hash in self.rows and not self.pinned(content_hash):
            self.cache.discard(content_hash)
            del self.rows[content_hash]
        else:
            why = "is pinned" if content_hash in self.rows else "has no rows"
            with pytest.raises(ValueError, match=f"{content_hash} {why}"):
                self.cache.discard(content_hash)

    @rule()
    def discard_unpinned(self):
        self.cache.discard_unpinned()
        for content_hash in [h for h in self.rows if not self.pinned(h)]:
            del self.rows[content_hash]

    @invariant()
    def each_row_has_one_entry_at_most(self):
        rows = [row for entry in self.rows.values() for row in entry]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(NUM_ROWS))

    def teardown(self):
        for content_hash in "abcdef":
            assert (self.cache.lookup(content_hash) is None) == (content_hash not in self.rows)
        for user in "uvw":
            self.cache.unpin(user)
        assert sorted(self.cache.allocate("all of it", NUM_ROWS).tolist()) == list(range(NUM_ROWS))


Cache.TestCase.settings = hypothesis.settings(deadline=None, max_examples=80, stateful_step_count=40)
TestCache = Cache.TestCase


def test_the_least_recently_used_goes_first_and_the_pinned_never():
    cache = EncoderCache(6)
    for content_hash in "abc":
        cache.allocate(content_hash, 2)
    cache.lookup("a")
    cache.pin("b", "u")
    cache.allocate("d", 2)
    assert [h for h in "abcd" if cache.lookup(h) is not None] == ["a", "b", "d"]
    assert cache.allocate("e", 5) is None
    assert [h for h in "abd" if cache.lookup(h) is not None] == ["a", "b", "d"]
    cache.unpin("u")
    assert len(cache.allocate("e", 6)) == 6


def test_a_text_models_cache_has_no_rows():
    cache = EncoderCache(0)
    assert cache.lookup("a") is None
    assert cache.allocate("a", 1) is None
    cache.unpin("nobody")
