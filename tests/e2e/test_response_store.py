"""Responses that are kept, and what an agent of OpenAI's API sends beside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from tests.e2e.conftest import Scripted, Server, fake
from tests.strictly import validated

FUNCTION: Any = {"type": "function", "name": "shell", "parameters": {"type": "object"}}
PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
OTHERS: Any = [
    {"type": "web_search", "external_web_access": True},
    {"type": "local_shell"},
    {"type": "image_generation", "output_format": "png"},
    {"type": "mcp", "server_label": "x", "server_url": "https://example.org"},
    {"type": "namespace", "name": "n", "description": "d", "tools": [FUNCTION]},
    {"type": "file_search", "vector_store_ids": ["v"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
]
PATCH_CALL = '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "*** Begin\\n+ü"}}\n</tool_call>'
CALL = '<tool_call>\n{"name": "shell", "arguments": {"city": "ls"}}\n</tool_call>'
# As Codex sends it.
AGENT: Any = {
    "model": "fake-model",
    "instructions": "You are a coding agent.",
    "tools": [FUNCTION, PATCH, *OTHERS],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "high", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "thread",
    "text": {"verbosity": "low"},
    "service_tier": "priority",
}
METADATA = {"client_metadata": {"x-codex-installation-id": "i"}}


def create(model: Scripted, says: str, **body: Any) -> Any:
    model.says(says)
    return model.client.responses.create(**{"model": "fake-model", "input": "hello", **body})


def test_a_conversation_goes_on_by_id(model: Scripted) -> None:
    first = create(model, "Yes.")
    second = create(model, "More.", previous_response_id=first.id, input="why?")
    assert second.previous_response_id == first.id
    by_hand = [{"role": "user", "content": "hello"}, *[item.model_dump() for item in first.output]]
    whole = create(model, "More.", input=[*by_hand, {"role": "user", "content": "why?"}])
    assert second.usage.input_tokens == whole.usage.input_tokens
    third = create(model, "Well.", previous_response_id=second.id, stream=True)
    assert [event.type for event in third][-1] == "response.completed"


def test_kept_responses_are_as_they_were(model: Scripted) -> None:
    made = create(model, f"<think>Hm.</think>Yes.{CALL}", tools=[FUNCTION], metadata={"a": "b"})
    kept = model.client.responses.retrieve(made.id)
    assert kept.model_dump() == made.model_dump()
    assert httpx.get(f"{model.url}/v1/responses/{made.id}?stream=true").status_code == 400
    answer = httpx.get(f"{model.url}/v1/responses/{made.id}")
    validated(Response, answer.content)
    items = model.client.responses.input_items.list(made.id)
    (item,) = items.data
    assert (item.type, item.role, item.content[0].text) == ("message", "user", "hello")
    model.client.responses.delete(made.id)
    for gone in (
        lambda: model.client.responses.retrieve(made.id),
        lambda: model.client.responses.delete(made.id),
        lambda: model.client.responses.input_items.list(made.id),
        lambda: model.client.responses.cancel(made.id),
        lambda: create(model, "x", previous_response_id=made.id),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            gone()
    assert missing.value.code == "previous_response_not_found"


def test_pages_of_items(model: Scripted) -> None:
    turns = [{"role": "user", "content": str(number)} for number in range(30)]
    made = create(model, "Yes.", input=turns)
    pages = model.client.responses.input_items.list(made.id, limit=7, order="asc")
    assert [item.content[0].text for item in pages] == [str(number) for number in range(30)]  # of all pages
    last = model.client.responses.input_items.list(made.id, limit=1)
    assert (last.data[0].content[0].text, last.has_more) == ("29", True)
    for query in ("limit=0", "limit=x", "limit=101", "limit=" + "9" * 5000, "order=up", "limit=²"):
        answer = httpx.get(f"{model.url}/v1/responses/{made.id}/input_items?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


def test_what_is_not_kept_and_what_cannot_be_cancelled(model: Scripted) -> None:
    made = create(model, "Yes.", store=False)
    with pytest.raises(openai.NotFoundError):
        model.client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        model.client.responses.cancel(create(model, "Yes.").id)


def test_an_agent_s_requests(model: Scripted) -> None:
    """Its tools of all kinds, free text as a tool's input, and the history that it sends back."""
    model.says(PATCH_CALL)
    turns: list[Any] = [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Go."}]}]
    events: list[Any] = list(model.client.responses.create(**AGENT, input=turns, extra_body=METADATA))
    kinds = [event.type for event in events]
    assert (
        kinds.count("response.custom_tool_call_input.delta") == kinds.count("response.custom_tool_call_input.done") == 1
    )
    (call,) = events[-1].response.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply_patch", "*** Begin\n+ü")
    turns += [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
        call.model_dump(),
        {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done."},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
        {
            "type": "local_shell_call",
            "call_id": "c",
            "status": "completed",
            "action": {"type": "exec", "command": ["l"]},
        },
        {"type": "local_shell_call_output", "call_id": "c", "output": "x"},
    ]
    model.says(CALL)
    answer = httpx.post(f"{model.url}/v1/responses", json={**AGENT, **METADATA, "input": turns, "stream": False})
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["type"] == "function_call"
    assert [tool["type"] for tool in answer.json()["tools"]] == ["function", "custom"]
    ignored = answer.headers["x-minisgl-ignored"]
    for name in ("tools[].web_search", "tools[].mcp", "tools[].namespace", "client_metadata", "service_tier"):
        assert name in ignored


@pytest.fixture(scope="module")
def guarded(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "guarded.log"
    with Server.running(fake(model_path, api_key="sk-1,sk-2"), log) as server:
        yield server


def test_another_key_finds_nothing(guarded: Server) -> None:
    def http(key: str) -> httpx.Client:
        return httpx.Client(base_url=f"{guarded.url}/v1", headers={"authorization": f"Bearer {key}"})

    with http("sk-1") as one, http("sk-2") as two:
        made = one.post("/responses", json={"input": "hello", "max_output_tokens": 3}).json()
        assert one.get(f"/responses/{made['id']}").json() == made
        assert one.get(f"/responses/{made['id']}", headers={"authorization": "", "x-api-key": "sk-1"}).json() == made
        reference = {"type": "item_reference", "id": made["output"][0]["id"]}
        asked = {"max_output_tokens": 3, "input": [{"role": "user", "content": "x"}, reference]}
        counts = [
            json.loads(http.post("/responses", json=asked).content)["usage"]["input_tokens"] for http in (one, two)
        ]
        assert counts[0] > counts[1]
        for answer in (
            two.get(f"/responses/{made['id']}"),
            two.delete(f"/responses/{made['id']}"),
            two.get(f"/responses/{made['id']}/input_items"),
            two.post("/responses", json={"input": "x", "previous_response_id": made["id"]}),
        ):
            assert answer.status_code == 404
        assert one.delete(f"/responses/{made['id']}").json()["deleted"] is True
