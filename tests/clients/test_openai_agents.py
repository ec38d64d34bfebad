"""OpenAI's Agents SDK, with the built-in model: on responses, which is its default, and on chats."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def answers(demo: Server) -> Any:
    return run_client("openai_agents_client", f"{demo.url}/v1", MODEL, OPENAI_AGENTS_DISABLE_TRACING="1")


@pytest.fixture(params=["responses", "chats"])
def found(answers: Any, request: pytest.FixtureRequest) -> Any:
    """Of one API."""
    return answers[request.param]


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 2
    assert found["usage"] > 0


def test_tools(found: Any) -> None:
    made = found["tools"]
    assert made["items"] == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert made["streamed"] == ["tool_called", "tool_output", "message_output_created"]
    assert all("sunny in Paris" in output for output in made["outputs"])
    assert made["later"] == "3 + 4 = 7."


def test_handoffs(found: Any) -> None:
    agent, output = found["handoff"]
    assert agent == "Forecaster" and output.startswith("It is sunny in ")


def test_output_types(found: Any) -> None:
    assert found["persons"] == [{"name": "Anna", "age": 31}] * 4


def test_errors(found: Any) -> None:
    assert found["missing"] == ["NotFoundError", "model_not_found", "model"]
    assert found["long"][:2] == ["BadRequestError", "context_length_exceeded"]
