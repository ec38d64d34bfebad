"""Vectors and scores on a GPU, against transformers."""

from __future__ import annotations

from tests.integration.test_vectors import (
    lm,
    source,
    test_an_abort_leaves_nothing,
    test_any_decoder_gives_vectors_and_writes,
    test_scores_by_yes_and_no,
)

__all__ = [
    "lm",
    "source",
    "test_an_abort_leaves_nothing",
    "test_any_decoder_gives_vectors_and_writes",
    "test_scores_by_yes_and_no",
]
