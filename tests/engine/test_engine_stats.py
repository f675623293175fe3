"""Times as a histogram."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from aphrodite_jax.engine.stats import EngineStats, Times


@hypothesis.given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_at_most_an_eighth_too_high(seconds, share):
    times = Times()
    for x in seconds:
        times.add(x)
    exact = np.quantile(seconds, share, method="inverted_cdf")
    assert exact * (1 - 1e-9) <= times.quantile(share) <= exact * 1.123
    summary = times.summary()
    assert summary["count"] == len(seconds)
    assert summary["mean"] == pytest.approx(np.mean(seconds))
    assert summary["max"] == max(seconds)


def test_times_outside_the_range_are_counted_at_its_ends():
    times = Times()
    for x in (0.0, 1e9):
        times.add(x)
    assert times.quantile(0.5) == pytest.approx(1e-5)
    assert times.quantile(1.0) >= 1e3
    assert Times().summary() == {"count": 0, "mean": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0}


def test_stats_are_plain_values():
    stats = EngineStats(requests=2)
    stats.time_to_first_token.add(0.5)
    values = stats.as_dict({"pages": 7})
    assert values["requests"] == 2
    assert values["time_to_first_token"]["count"] == 1
    assert list(values)[-1] == "pages"
