"""What the server answers, field by field against the `openai` package's types."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.pagination import SyncPage
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter

from tests.e2e.conftest import Scripted
from tests.strictly import validated

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "ü"]}}\n</tool_call>'
CHAT_EXTENSIONS = ("reasoning_content",)
MODEL_EXTENSIONS = ("root", "max_model_len")
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "seed": 1}
TEXT = {"prompt": ["a", "b"], "max_tokens": 5, "seed": 1}
VARIANTS: list[dict[str, Any]] = [{}, {"n": 2}, {"ignore_eos": True}, {"stop": ["e", "a"]}, {"temperature": 0}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        ("/v1/chat/completions", CHAT, ChatCompletion, ChatCompletionChunk),
        ("/v1/completions", TEXT, Completion, Completion),
    ],
    ids=["chat", "completions"],
)
def test_answers_and_chunks(
    http: httpx.Client, path: str, body: dict[str, Any], whole: Any, chunk: Any, variant: dict[str, Any]
) -> None:
    answer = http.post(path, json={**body, **variant})
    assert answer.status_code == 200
    made = validated(whole, answer.content)
    assert made.usage is not None
    for options in ({}, {"stream_options": {"include_usage": True}}):
        events = http.post(path, json={**body, **variant, "stream": True, **options}).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        texts = [event.removeprefix("data: ") for event in events[:-2]]
        if chunk is Completion:  # the API's own chunks have null until the end, which this type does not know
            texts = [text.replace('"finish_reason":null', '"finish_reason":"stop"') for text in texts]
        chunks = [validated(chunk, text) for text in texts]
        usage = chunks[-1].usage
        assert (usage.total_tokens == made.usage.total_tokens) if options else usage is None
        assert len({made.id for made in chunks}) == 1


@pytest.mark.parametrize("says", [f"<think>\nHm.\n</think>\n\nYes.\n{CALL}", CALL, "<think>Hm.", "Yes."])
def test_calls_and_reasoning(model: Scripted, says: str) -> None:
    """Of the answers and every event, in chats and responses."""
    model.says(says)
    function: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
    chat = {**CHAT, "max_tokens": 200, "tools": [{"type": "function", "function": function}]}
    responses = {"input": "hello", "tools": [{"type": "function", **function}]}
    thinks = says.startswith("<think>")
    with httpx.Client(base_url=model.url, timeout=60) as http:
        made = validated(ChatCompletion, http.post("/v1/chat/completions", json=chat).content, CHAT_EXTENSIONS)
        assert ("reasoning_content" in (made.choices[0].message.model_extra or {})) == thinks
        assert (made.usage.completion_tokens_details.reasoning_tokens > 0) == thinks
        for event in events_of(http, "/v1/chat/completions", chat)[:-1]:
            validated(ChatCompletionChunk, event, CHAT_EXTENSIONS)
        whole = validated(Response, http.post("/v1/responses", json=responses).content)
        assert any(item.type == "reasoning" for item in whole.output) == thinks
        events = [validated(ResponseStreamEvent, event) for event in events_of(http, "/v1/responses", responses)]
    assert [item.type for item in events[-1].response.output] == [item.type for item in whole.output]
    assert (made.choices[0].finish_reason == "tool_calls") == (whole.output[-1].type == "function_call")


def events_of(http: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    frames = http.post(path, json={**body, "stream": True}).text.split("\n\n")
    return [frame.split("data: ", 1)[1] for frame in frames[:-1]]


def test_models(http: httpx.Client) -> None:
    validated(Model, http.get("/v1/models/tiny").content, MODEL_EXTENSIONS)
    page = TypeAdapter(SyncPage[Model]).validate_json(http.get("/v1/models").content)
    assert [model.id for model in page.data] == ["tiny"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/nope", "/tokenize"])
def test_errors(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={"model": 7})
    assert set(answer.json()) == {"error"}
    error = TypeAdapter(ErrorObject).validate_python(answer.json()["error"], strict=True)
    assert not error.model_extra
