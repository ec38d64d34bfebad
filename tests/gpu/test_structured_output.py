"""Masks on a GPU: computed on the host while it computes, which reach the sampling kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minisgl import LLM
from tests.gpu.conftest import DEVICE
from tests.integration.test_structured_output import (
    test_an_abort_leaves_nothing_behind,
    test_every_output_validates,
    test_kinds,
    test_plain_requests_get_the_same_tokens_in_a_mixed_batch,
    test_stop_strings_and_limits_hold_within_a_grammar,
)

__all__ = [
    "test_an_abort_leaves_nothing_behind",
    "test_every_output_validates",
    "test_kinds",
    "test_plain_requests_get_the_same_tokens_in_a_mixed_batch",
    "test_stop_strings_and_limits_hold_within_a_grammar",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device=DEVICE, dtype="float32", max_running_requests=16, num_pages=4096, page_size=1) as llm:
        yield llm
