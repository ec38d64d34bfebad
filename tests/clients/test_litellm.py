"""LiteLLM, with the built-in model, as its OpenAI provider and as vLLM's call it. `litellm_client.py` runs it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server

PROVIDERS = ["openai", "hosted_vllm"]


@pytest.fixture(scope="module")
def answers(demo: Server) -> Any:
    # Its prices of models, which it would fetch.
    return run_client("litellm_client", f"{demo.url}/v1", MODEL, LITELLM_LOCAL_MODEL_COST_MAP="True")


@pytest.fixture(params=PROVIDERS)
def found(answers: Any, request: pytest.FixtureRequest) -> Any:
    """Of one provider."""
    return answers[request.param]


def test_chats(found: Any) -> None:
    assert found["chats"]["texts"] == ["3 + 4 = 7."] * 4
    whole, streamed = found["chats"]["tokens"]
    assert whole == streamed > 0
    assert found["chats"]["finish_reason"] == "stop"


def test_tools(found: Any) -> None:
    assert found["tools"]["calls"] == [["tool_calls", "get_weather", {"city": "Paris"}]] * 2
    assert all("sunny" in final for final in found["tools"]["finals"])


def test_forms(found: Any) -> None:
    assert found["forms"]["parsed"] == {"name": "Anna", "age": 31}
    assert isinstance(found["forms"]["loose"], dict)
    assert set(found["forms"]["forced"]) == {"get_weather"}


def test_fields(found: Any) -> None:
    assert found["fields"]["ends"] == [["length", 8]] * 2


def test_errors_keep_their_kind(found: Any) -> None:
    kind, message = found["errors"]["bad"]
    assert kind == "BadRequestError" and "top_p: input should be" in message
    assert found["errors"]["missing"][0] == "NotFoundError"
    assert found["errors"]["long"][0] == "ContextWindowExceededError"


def test_responses(found: Any) -> None:
    assert found["responses"]["text"] == "3 + 4 = 7."


@pytest.mark.parametrize("provider", [*PROVIDERS, "text-completion-openai"])
def test_text_completions(answers: Any, provider: str) -> None:
    made = answers["texts"][provider]
    whole, streamed = made["texts"]
    assert whole == streamed != ""
    assert made["echoed"].startswith("Once upon a time" + whole[:2])
    assert made["logprobs"][0] is None
    assert len(made["logprobs"]) == made["prompt_tokens"] + 1
