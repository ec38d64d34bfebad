"""The `anthropic` library in its default use, and a session as a coding agent of that API leads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.clients.prompts import ANNA, MODEL, SUM, WEATHER, Person, get_weather
from tests.e2e.conftest import Server

TOOL: Any = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
GREEDY: Any = {"model": MODEL, "max_tokens": 100, "extra_body": {"temperature": 0}}
SUNNY = '{"sky": "sunny"}'


@pytest.fixture
def client(demo: Server) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_message(client: Any) -> None:
    made = client.messages.create(**GREEDY, messages=SUM, system="You are terse.")
    assert (made.type, made.role, made.model, made.stop_reason) == ("message", "assistant", MODEL, "end_turn")
    assert [block.text for block in made.content] == ["3 + 4 = 7."]
    assert made.usage.input_tokens + made.usage.cache_read_input_tokens > 20
    assert made._request_id
    counted = client.messages.count_tokens(model=MODEL, messages=SUM, system="You are terse.")
    assert counted.input_tokens == made.usage.input_tokens + made.usage.cache_read_input_tokens


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("how", ["whole", "streamed", "raw"])
def test_a_tool(client: Any, how: str, beta: bool) -> None:
    """A call, its result, and the answer; the message goes back as the library gave it, and as JSON."""
    api = client.beta.messages if beta else client.messages
    asked: Any = {**GREEDY, "messages": WEATHER, "tools": [TOOL]}
    if how == "whole":
        made = api.create(**asked)
    elif how == "streamed":
        with api.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            made = stream.get_final_message()
        assert {"message_start", "content_block_start", "input_json", "message_delta", "message_stop"} <= {*kinds}
    else:
        events = list(api.create(**asked, stream=True))
        assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]
        written = "".join(event.delta.partial_json for event in events if event.type == "content_block_delta")
        assert json.loads(written) == {"city": "Paris"}
        made = api.create(**asked)
    assert made.stop_reason == "tool_use"
    (call,) = made.content
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": SUNNY}]}]
    for content in (made.content, [block.model_dump() for block in made.content]):
        turns = [*WEATHER, {"role": "assistant", "content": content}, {"role": "user", "content": result}]
        final = api.create(**{**asked, "messages": turns})
        assert "sunny" in final.content[0].text
        assert final.usage.cache_read_input_tokens > 100


@pytest.mark.parametrize("stream", [False, True])
def test_the_library_runs_tools(client: Any, stream: bool) -> None:
    asked: Any = {"messages": WEATHER, "tools": [anthropic.beta_tool(get_weather)], "stream": stream}
    made = [
        turn.get_final_message() if stream else turn for turn in client.beta.messages.tool_runner(**GREEDY, **asked)
    ]
    assert [turn.stop_reason for turn in made] == ["tool_use", "end_turn"]
    assert (made[0].content[0].name, made[0].content[0].input) == ("get_weather", {"city": "Paris"})
    assert made[1].content[0].text


@pytest.mark.parametrize(
    ("choice", "calls"),
    [({"type": "any"}, True), ({"type": "tool", "name": "get_weather"}, True), ({"type": "none"}, False)],
)
def test_choices_of_tools(client: Any, choice: Any, calls: bool) -> None:
    choice = {**choice, **({"disable_parallel_tool_use": True} if calls else {})}
    made = client.messages.create(**GREEDY, messages=SUM if calls else WEATHER, tools=[TOOL], tool_choice=choice)
    assert (made.stop_reason == "tool_use") == calls
    assert [block.type for block in made.content] == (["tool_use"] if calls else ["text"])


def test_ends(client: Any) -> None:
    stopped = client.messages.create(**GREEDY, messages=SUM, stop_sequences=["never", "="])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "=", "3 + 4 ")
    cut = client.messages.create(**{**GREEDY, "max_tokens": 2}, messages=SUM)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 2)


def test_a_message_that_is_begun_goes_on(client: Any) -> None:
    for begun in ("3 + 4 =", [{"type": "text", "text": "3 + 4 ="}]):
        made = client.messages.create(**GREEDY, messages=[*SUM, {"role": "assistant", "content": begun}])
        assert made.content[0].text == " 7."


def test_parsed_output(client: Any) -> None:
    made = client.messages.parse(**GREEDY, messages=ANNA, output_format=Person)
    assert made.parsed_output == Person(name="Anna", age=31)


async def test_the_async_client(demo: Server) -> None:
    async with anthropic.AsyncAnthropic(base_url=demo.url, auth_token="none", max_retries=0) as made:
        whole = await made.messages.create(**GREEDY, messages=SUM)
        async with made.messages.stream(**GREEDY, messages=SUM) as stream:
            text = "".join([piece async for piece in stream.text_stream])
    assert text == whole.content[0].text == "3 + 4 = 7."


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        r"messages\[0\].content\[0\].*image",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url"}}]}]}, "document"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\].text"),
    ({"messages": [{"role": "king", "content": "a"}]}, r"messages\[0\].role"),
    ({"messages": []}, "messages must not be empty"),
    ({"messages": [{"role": "user", "content": "a " * 9000}]}, "tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, r"tools\[0\].name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "gone"}, "tools": [TOOL]}, "gone"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"output_config": {"format": {"type": "yaml"}}}, "output_config.format"),
    ({"system": [{"type": "image"}]}, r"system\[0\]"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("wrong", "words"), BAD, ids=[words for _, words in BAD])
def test_refusals(client: Any, wrong: dict[str, Any], words: str, stream: bool) -> None:
    asked = {"model": MODEL, "max_tokens": 9, "messages": SUM, "stream": stream, **wrong}
    with pytest.raises(anthropic.BadRequestError, match=words) as refused:
        client.messages.create(**asked)
    body = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["request_id"] == refused.value.request_id


def test_other_errors_have_the_library_s_classes(client: Any, http: httpx.Client) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude", max_tokens=9, messages=SUM)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.list()
    for answer, kind in (
        (http.get("/v1/messages"), "invalid_request_error"),
        (http.post("/v1/messages", content="{}"), "invalid_request_error"),
        (http.post("/v1/messages/batches", json={}), "not_found_error"),
    ):
        assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)


TOOLS: Any = [
    TOOL,
    *(
        {
            "name": name,
            "description": f"{text} Use it only when the user asks for it.",
            "input_schema": {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {"file_path": {"type": "string", "description": "The absolute path."}},
                "additionalProperties": False,
            },
            "eager_input_streaming": True,
        }
        for name, text in (("Read", "Reads a file."), ("Write", "Writes a file."), ("Glob", "Finds files."))
    ),
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
]
CITIES = ["Paris", "London", "Rome", "Berlin", "Madrid"]
LONG = " ".join(["You help with the weather, and with the files of the user. Answer in one sentence."] * 12)


def test_an_agent_s_session_of_ten_turns(demo: Server, client: Any) -> None:
    """Each request begins with another line, each turn adds a call's result or a question, and the rest is cached."""
    turns: list[Any] = []
    shares: list[float] = []
    calls = 0

    def ask(content: Any) -> Any:
        turns.append({"role": "user", "content": content})
        number = len(turns)
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number * 7919:x};"},
            {"type": "text", "text": "You are a command-line agent.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]
        sent = json.loads(json.dumps(turns))
        sent[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}  # moves from turn to turn
        with client.beta.messages.stream(
            model=MODEL,
            max_tokens=60,
            system=system,
            messages=sent,
            tools=TOOLS,
            thinking={"type": "adaptive"},
            metadata={"user_id": "user_1_account__session_2"},
            betas=["claude-code-20250219", "context-management-2025-06-27"],
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            output_config={"effort": "high"},
            extra_body={"temperature": 0},
            extra_headers={"x-app": "cli"},
        ) as stream:
            made = stream.get_final_message()
        turns.append({"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in made.content]})
        usage = made.usage
        shares.append(usage.cache_read_input_tokens / (usage.cache_read_input_tokens + usage.input_tokens))
        return made

    for city in CITIES:
        made = ask([{"type": "text", "text": f"What is the weather in {city}?"}])
        results = []
        for call in [block for block in made.content if block.type == "tool_use"]:
            calls += 1
            results.append({"type": "tool_result", "tool_use_id": call.id, "content": SUNNY, "is_error": False})
        made = ask(results or [{"type": "text", "text": "And tomorrow?"}])
        assert made.stop_reason in ("end_turn", "tool_use")
    assert len(shares) == 10
    assert calls >= 3
    assert min(shares[1:]) >= 0.9, shares
