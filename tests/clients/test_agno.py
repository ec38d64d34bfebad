"""Agno, with the built-in model: its agents on each of its classes for servers of this kind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def answers(demo: Server) -> Any:
    return run_client("agno_client", f"{demo.url}/v1", MODEL, AGNO_TELEMETRY="false")


@pytest.fixture(params=["OpenAILike", "VLLM", "OpenAIResponses"])
def found(answers: Any, request: pytest.FixtureRequest) -> Any:
    """Of one class."""
    return answers[request.param]


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 2
    assert found["usage"] > 0


def test_tools(found: Any) -> None:
    assert found["calls"] == [["get_weather", {"city": "Paris"}, "It is sunny in Paris."]]
    assert all("sunny in Paris" in output for output in found["outputs"])


def test_output_types(found: Any) -> None:
    assert found["persons"] == [{"name": "Anna", "age": 31}] * 3


def test_errors(found: Any) -> None:
    (missing, long) = found["errors"]
    assert missing[0] == long[0] == "ERROR"
    assert "'missing' does not exist" in missing[1] and "maximum context length is 2048 tokens" in long[1]
