"""A short run of `soak.py`, and that its comparisons can fail."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.gpu import soak
from tests.gpu.conftest import DEVICE
from tests.models import tiny_model


def test_random_load_loses_no_page() -> None:
    counts = soak.main(["--seconds", "10", "--device", DEVICE])
    assert all(counts[kind] for kind in ("finished", "aborted", "retracted", "compared", "verified")), counts


KEY = (tuple(range(3, 40)), soak.KINDS[2])


def make_load() -> soak.Load:
    load = soak.Load(cast(Any, None), 0, tiny_model("qwen3", vocab_size=512))
    load.counts["verified"] = soak.MAX_VERIFIED  # no more by lot
    return load


def test_wrong_tokens_are_no_near_tie() -> None:
    load = make_load()
    load.compare(KEY, [5, 6, 7])
    with pytest.raises(AssertionError, match="no near-tie"):
        load.compare(KEY, [5, 6, 8, 9])


def test_equal_but_wrong_answers_are_found() -> None:
    load = make_load()
    load.verify(KEY, [5, 6, 7])
    load.counts.clear()
    with pytest.raises(AssertionError, match="are not what"):
        load.verify(KEY, [5, 6, 7])


def test_many_near_ties_are_refused() -> None:
    load = make_load()
    load.counts["near-ties"], load.num_checked = 2, 1999
    with pytest.raises(AssertionError):
        load.check_rate()
    load.num_checked = 2000
    load.check_rate()
