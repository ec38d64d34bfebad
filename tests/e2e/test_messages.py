"""/v1/messages where the model says what the test wants: blocks and events, history, keys and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Scripted, Server, fake

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "ü"]}}\n</tool_call>'
TOOLS = [{"name": "f", "input_schema": {"type": "object"}}, {"type": "bash_20250124", "name": "bash"}]
HELLO: Any = [{"role": "user", "content": "hello"}]


def post(model: Scripted, says: str, **body: Any) -> dict[str, Any]:
    model.says(says)
    answer = httpx.post(f"{model.url}/v1/messages?beta=true", json={"messages": HELLO, "max_tokens": 200, **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def events(model: Scripted, says: str, **body: Any) -> list[dict[str, Any]]:
    model.says(says)
    asked = {"messages": HELLO, "max_tokens": 200, "stream": True, **body}
    frames = httpx.post(f"{model.url}/v1/messages", json=asked).text.split("\n\n")
    assert frames.pop() == ""
    made = []
    for frame in frames:
        name, data = frame.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made


def accumulated(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events tell of, each block begun once and ended before the next."""
    message: dict[str, Any] = {}
    arguments = ""
    for event in made:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            arguments = ""
        elif kind == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            field = delta["type"].removesuffix("_delta")
            if field == "input_json":
                arguments += delta["partial_json"]
                continue
            block[field] += delta[field]
        elif kind == "content_block_stop" and arguments:
            message["content"][event["index"]]["input"] = json.loads(arguments)
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    assert [made[0]["type"], made[1]["type"], made[-1]["type"]] == ["message_start", "ping", "message_stop"]
    return message


@pytest.mark.parametrize(
    ("says", "kinds", "reason"),
    [
        (f"<think>\nHm.\n</think>\n\nYes.\n{CALL}", ["thinking", "text", "tool_use"], "tool_use"),
        (f"{CALL}\n{CALL}", ["tool_use", "tool_use"], "tool_use"),
        ("<think>Hm.", ["thinking"], "end_turn"),
        ("Yes.", ["text"], "end_turn"),
        ("", ["text"], "end_turn"),
    ],
)
def test_blocks_and_events(model: Scripted, says: str, kinds: list[str], reason: str) -> None:
    whole = post(model, says, tools=TOOLS)
    made = accumulated(events(model, says, tools=TOOLS))
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["stop_reason"] == reason
    for block, streamed in zip(whole["content"], made["content"], strict=True):
        for changing in ("id", "signature"):
            assert bool(block.pop(changing, "")) == bool(streamed.pop(changing, ""))
        assert block == streamed
    for name in ("type", "role", "model", "stop_reason", "stop_sequence"):
        assert whole[name] == made[name]
    assert sum(whole["usage"].values()) == sum(made["usage"].values())


def test_one_call_only(model: Scripted) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(post(model, f"{CALL}\n{CALL}", tools=TOOLS, tool_choice=choice)["content"]) == 1


def test_thinking_is_what_the_template_makes_of_it(model: Scripted) -> None:
    """The template of these tests opens the reasoning itself if `thinking` is true."""
    for kind, types in (("enabled", ["thinking", "text"]), ("adaptive", ["thinking", "text"]), ("disabled", ["text"])):
        made = post(model, "Hm.</think>Yes.", thinking={"type": kind, "budget_tokens": 1024})
        assert [block["type"] for block in made["content"]] == types


def tokens(model: Scripted, **body: Any) -> int:
    answer = httpx.post(f"{model.url}/v1/messages/count_tokens", json={"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


HISTORY: list[list[dict[str, Any]]] = [
    [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Yes."}],
    [
        {"type": "redacted_thinking", "data": "zzzz"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"city": "x"}},
    ],
    [{"type": "tool_use", "id": "t", "name": "f", "input": None}],
    [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, {"type": "web_search_tool_result"}],
    [{"type": "something_new"}],
    [],
]


@pytest.mark.parametrize("said", HISTORY, ids=[str(blocks)[:40] for blocks in HISTORY])
def test_history_is_taken(model: Scripted, said: list[dict[str, Any]]) -> None:
    results = [{"type": "tool_result", "tool_use_id": "t", "is_error": True}, {"type": "text", "text": "go on"}]
    turns = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": results}]
    assert post(model, "Yes.", messages=turns)["content"][0]["text"] == "Yes."


def test_what_does_not_count(model: Scripted) -> None:
    """Marks of a cache, and the line that the client has for another server."""
    mark = {"cache_control": {"type": "ephemeral"}}
    plain = tokens(model, system="Be brief.\nAnswer.")
    assert plain > tokens(model)
    line = "x-anthropic-billing-header: cc_version=2.1.9; cc_entrypoint=cli; cch=0a1b2;"
    for system in (
        f"{line}\nBe brief.\nAnswer.",
        [
            {"type": "text", "text": line},
            {"type": "text", "text": "Be brief.", **mark},
            {"type": "text", "text": "Answer."},
        ],
        [{"type": "text", "text": f"{line}\n\nBe brief."}, {"type": "text", "text": "Answer.", **mark}],
    ):
        assert tokens(model, system=system, metadata={"user_id": "u"}, max_tokens=5) == plain
    assert tokens(model, system=f"Be brief.\n{line}\nAnswer.") > plain
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hello"}, **mark}
    assert tokens(model, messages=[{"role": "user", "content": [document]}]) == tokens(model)
    assert tokens(model, messages=[*HELLO, *HELLO]) == tokens(
        model, messages=[{"role": "user", "content": "hello\nhello"}]
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_told_as_its_clients_know_it(model: Scripted, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "a b " * 100_000}], "max_tokens": 5, "stream": stream}
    answer = httpx.post(f"{model.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.fullmatch(r"prompt is too long: \d+ tokens > \d+ maximum", error["message"])


@pytest.fixture(scope="module")
def guarded(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "guarded.log"
    with Server.running(fake(model_path, api_key="sk-1"), log, MINISGL_MAX_BODY_BYTES="2000") as server:
        yield server


def test_errors_have_anthropic_s_shape(guarded: Server) -> None:
    key = {"x-api-key": "sk-1", "anthropic-version": "2023-06-01"}
    body = {"messages": HELLO, "max_tokens": 3}
    url = f"{guarded.url}/v1/messages"
    for headers in (key, {"authorization": "Bearer sk-1"}, {"authorization": "Bearer no", "x-api-key": "sk-1"}):
        assert httpx.post(url, json=body, headers=headers).status_code == 200
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200
    for answer, status, kind in (
        (httpx.post(url, json=body), 401, "authentication_error"),
        (httpx.post(url, json=body, headers={"x-api-key": ""}), 401, "authentication_error"),
        (httpx.post(f"{url}/count_tokens", json=body, headers={"x-api-key": "sk-2"}), 401, "authentication_error"),
        (httpx.post(url, json={**body, "model": "x"}, headers=key), 404, "not_found_error"),
        (httpx.post(f"{url}/batches", json=body, headers=key), 404, "not_found_error"),
        (httpx.post(url, json={**body, "system": "x" * 2000}, headers=key), 413, "request_too_large"),
        (httpx.post(url, content="hello", headers=key), 415, "invalid_request_error"),
        (httpx.post(url, json={}, headers=key), 400, "invalid_request_error"),
    ):
        assert answer.status_code == status, answer.text
        made = answer.json()
        assert (made["type"], made["error"]["type"]) == ("error", kind)
        assert made["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    elsewhere = httpx.post(f"{guarded.url}/v1/completions", json={})
    assert elsewhere.json()["error"]["code"] == "invalid_api_key"


def test_a_stream_that_fails_ends_with_an_error(start: Callable[..., Server], model_path: Path) -> None:
    server = start(fake(model_path, delay=0.3), MINISGL_SSE_KEEPALIVE="0.1")
    body = {"messages": HELLO, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: ping"  # before the first token, what keeps it alive
        for line in lines:
            if line.startswith("event: content_block_delta"):
                server.child("minisgl-TP0-scheduler").kill()
                break
        last = [line for line in lines if line.startswith("data: ")][-1]
    made = json.loads(last.removeprefix("data: "))
    assert (made["type"], made["error"]["type"]) == ("error", "overloaded_error")
