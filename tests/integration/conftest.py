"""Ranks of an `LLM` are forked, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import HAS_GPU
from tests.forked import ranks


@pytest.fixture(scope="package", autouse=True)
def forked_ranks() -> Iterator[None]:
    if HAS_GPU:
        yield
    else:
        with ranks():
            yield
