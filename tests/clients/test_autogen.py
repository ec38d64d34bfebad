"""AutoGen, with the built-in model: an assistant, its tools and output type, and a team of two.

It runs in a process of its own, with the packages of `apart/older.txt`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def found(demo: Server) -> Any:
    return run_client("autogen_client", f"{demo.url}/v1", MODEL, apart="older")


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 2
    assert found["usage"] > 0


def test_tools(found: Any) -> None:
    assert all("sunny in Paris" in output for output in found["tools"])


def test_output_types(found: Any) -> None:
    assert found["persons"] == [{"name": "Anna", "age": 31}] * 4


def test_a_team(found: Any) -> None:
    """Their messages have names."""
    assert found["team"] == ["user", "one", "two", "one"]


def test_errors(found: Any) -> None:
    assert found["missing"] == ["NotFoundError", "model_not_found"]
    assert found["long"] == ["BadRequestError", "context_length_exceeded"]
