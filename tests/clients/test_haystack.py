"""Haystack, with the built-in model: its two generators for OpenAI's APIs, and agents on them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def answers(demo: Server) -> Any:
    return run_client("haystack_client", f"{demo.url}/v1", MODEL, HAYSTACK_TELEMETRY_ENABLED="False")


@pytest.fixture(params=["OpenAIChatGenerator", "OpenAIResponsesChatGenerator"])
def found(answers: Any, request: pytest.FixtureRequest) -> Any:
    """Of one API."""
    return answers[request.param]


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 3
    assert found["usage"] > 0


def test_tools(found: Any) -> None:
    made = found["tools"]
    assert made["calls"] == [["get_weather", {"city": "Paris"}]] * 2
    assert made["roles"] == [["user", "assistant", "tool", "assistant"]] * 2
    assert all("sunny in Paris" in output for output in made["outputs"])


def test_output_types(found: Any) -> None:
    assert found["persons"] == [{"name": "Anna", "age": 31}] * 2


def test_errors(found: Any) -> None:
    assert found["missing"] == ["NotFoundError", "model_not_found"]
    assert found["long"] == ["BadRequestError", "context_length_exceeded"]
