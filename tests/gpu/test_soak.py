"""A short run of `soak.py`."""

from __future__ import annotations

from tests.gpu import soak
from tests.gpu.conftest import DEVICE


def test_random_load_loses_no_page() -> None:
    counts = soak.main(["--seconds", "10", "--device", DEVICE])
    assert all(counts[kind] > 3 for kind in ("finished", "aborted", "retracted", "compared")), counts
