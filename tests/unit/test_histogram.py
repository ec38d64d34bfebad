"""Counting in buckets, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.message.messages import Histogram

BOUNDS = (0.5, 1.0, 2.0, 4.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5))))
def test_values_are_counted_where_they_belong(values: list[tuple[float, int]]) -> None:
    """Prometheus counts a value that equals a bound below it; numpy's buckets are closed on the left, so negate."""
    histogram = Histogram(BOUNDS)
    for value, times in values:
        histogram.add(value, times)
    edges = [-np.inf, *(-bound for bound in reversed(BOUNDS)), np.inf]
    negated = [-value for value, _ in values]
    expected, _ = np.histogram(negated, bins=edges, weights=[times for _, times in values])
    assert histogram.counts == [int(count) for count in reversed(expected)]
    assert histogram.total == pytest.approx(sum(value * times for value, times in values))
