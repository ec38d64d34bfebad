"""Pydantic AI, with the built-in model: agents with tools and with each kind of output."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def answers(demo: Server) -> Any:
    return run_client("pydantic_ai_client", f"{demo.url}/v1", MODEL)


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
def found(answers: Any, request: pytest.FixtureRequest) -> Any:
    """Of one API."""
    return answers[request.param]


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 3
    assert found["usage"] > 0


def test_tools(found: Any) -> None:
    made = found["tools"]
    assert all("sunny in Paris" in output for output in made["outputs"])
    assert made["parts"] == ["user-prompt", "tool-call", "tool-return", "text"]
    assert made["later"] == "3 + 4 = 7."


@pytest.mark.parametrize("kind", ["a type", "ToolOutput", "NativeOutput", "PromptedOutput"])
def test_outputs(found: Any, kind: str) -> None:
    assert found["persons"][kind] == [{"name": "Anna", "age": 31}] * 3


def test_complaints_are_taken(found: Any) -> None:
    """They answer the call of the output, which comes back in the history."""
    assert found["complaints"] == 2


def test_errors(found: Any) -> None:
    assert found["missing"] == [404, "model_not_found", "model"]
    assert found["long"][:2] == [400, "context_length_exceeded"]
