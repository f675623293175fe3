"""Mapped media by content: what is kept, and in which order it goes."""

import numpy as np
import pytest

from aphrodite_jax.engine.media_cache import MediaCache


def arrays(size):
    return {"pixel_values": np.zeros(size, np.uint8)}


def test_the_least_recently_used_goes_first_and_the_bound_holds():
    cache = MediaCache(10)
    for name in "abc":
        cache.put(name, arrays(4))
    assert cache.num_bytes == 8
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.put("d", arrays(3))  # c was used before b
    assert cache.get("c") is None
    assert cache.get("b")["pixel_values"].shape == (4,)
    assert cache.num_bytes == 7
    assert (cache.hits, cache.misses) == (2, 2)


def test_what_is_kept_is_read_only_and_what_is_too_large_is_not_kept():
    cache = MediaCache(3)
    kept, large = arrays(3), arrays(4)
    cache.put("a", kept)
    cache.put("b", large)
    assert cache.get("b") is None
    with pytest.raises(ValueError, match="read-only"):
        cache.get("a")["pixel_values"][0] = 1
    large["pixel_values"][0] = 1
