"""`InferenceClient` of `huggingface_hub`, with the built-in model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.prompts import ANNA, GET_WEATHER, LONG, MODEL, SUM, WEATHER, Person
from tests.e2e.conftest import Server

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@pytest.fixture
def client(demo: Server) -> InferenceClient:
    return InferenceClient(base_url=f"{demo.url}/v1", api_key="none", timeout=60)


def test_texts(client: InferenceClient) -> None:
    whole = client.chat_completion(**GREEDY, messages=SUM)
    assert whole.choices[0].message.content == "3 + 4 = 7."
    assert whole.usage.completion_tokens > 0
    chunks = list(client.chat_completion(**GREEDY, messages=SUM, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "3 + 4 = 7."
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tools(client: InferenceClient) -> None:
    message = client.chat_completion(**GREEDY, messages=WEATHER, tools=[GET_WEATHER]).choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."}
    messages: list[Any] = [*WEATHER, message, result]
    assert "sunny" in str(
        client.chat_completion(**GREEDY, messages=messages, tools=[GET_WEATHER]).choices[0].message.content
    )


def test_response_format(client: InferenceClient) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "Person", "schema": Person.model_json_schema()}}
    made = client.chat_completion(**GREEDY, messages=ANNA, response_format=schema)
    assert Person.model_validate_json(made.choices[0].message.content or "") == Person(name="Anna", age=31)


def test_errors_have_our_words(client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="'demo-9' does not exist"):
        client.chat_completion(model="demo-9", messages=SUM)
    with pytest.raises(HfHubHTTPError, match="maximum context length is 2048 tokens"):
        client.chat_completion(**GREEDY, messages=LONG)
