"""/v1/responses, with the stock client and its types."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.e2e.conftest import Server, fake
from tests.strictly import validated

PAST_EOS = {"ignore_eos": True}
HELLO: Any = [{"role": "user", "content": "hello"}]


def create(client: openai.OpenAI, **options: Any) -> Any:
    defaults = {"model": "tiny", "input": "hello", "max_output_tokens": 8, "extra_body": PAST_EOS}
    return client.responses.create(**{**defaults, **options})


def events_of(http: httpx.Client, **body: Any) -> list[Any]:
    """Every event, checked strictly; the lines around them too."""
    answer = http.post("/v1/responses", json={**PAST_EOS, "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames.pop() == ""
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(validated(ResponseStreamEvent, data.removeprefix("data: ")))
        assert name == f"event: {events[-1].type}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def test_a_response(client: openai.OpenAI) -> None:
    answer = create(client, temperature=0, instructions="Be brief.", metadata={"a": "b"})
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.model, answer.status) == ("response", "tiny", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert abs(answer.created_at - time.time()) < 60
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert message.content[0].text == answer.output_text != ""
    assert answer.usage.output_tokens == 8
    assert answer.usage.total_tokens == answer.usage.input_tokens + 8
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be brief.", {"a": "b"}, 8)
    assert answer._request_id


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hello"},
        {"input": HELLO, "instructions": "x", "temperature": 0.3, "top_p": 0.5, "user": "me", "top_k": 5},
        {"input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]}]},
        {"input": "hello", "metadata": {"k": "v", "number": 1}, "text": {"format": {"type": "text"}}, "store": False},
    ],
)
def test_answers_are_as_the_package_has_them(http: httpx.Client, body: dict[str, Any]) -> None:
    answer = http.post("/v1/responses", json={**body, "max_output_tokens": 3, "ignore_eos": True})
    made = validated(Response, answer.content)
    present = set(answer.json())
    newer = {"access_programs", "conversation", "image", "input_transformations", "moderation", "prompt"}
    newer |= {"prompt_cache_diagnostics", "prompt_cache_options", "prompt_cache_retention", "tool_usage"}
    assert set(Response.model_fields) - present <= newer
    assert made.top_p == body.get("top_p", 1.0)


def test_it_says_what_a_chat_says(client: openai.OpenAI) -> None:
    """Instructions are the system's message, and the rest of the conversation follows."""
    conversation: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "input_text", "text": "good"}, {"type": "input_text", "text": " day"}]},
    ]
    messages: Any = [{"role": "system", "content": "Be brief."}, *conversation[:2]]
    messages.append({"role": "user", "content": "good day"})
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, seed=3, temperature=0.9, extra_body=PAST_EOS
    )
    answer = create(
        client,
        instructions="Be brief.",
        input=conversation,
        max_output_tokens=12,
        temperature=0.9,
        extra_body={**PAST_EOS, "seed": 3},
    )
    assert answer.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens


def test_stops_are_honoured(client: openai.OpenAI) -> None:
    whole = create(client, temperature=0, max_output_tokens=40).output_text
    stop = next(whole[i : i + 3] for i in range(4, 60) if "\ufffd" not in whole[i : i + 3])
    answer = create(client, temperature=0, max_output_tokens=40, extra_body={**PAST_EOS, "stop": [stop]})
    assert answer.output_text == whole[: whole.index(stop)]
    assert (answer.status, answer.incomplete_details, answer.output[0].status) == ("completed", None, "completed")


def test_events_in_order(http: httpx.Client) -> None:
    body = {"input": "hello", "max_output_tokens": 64, "temperature": 0, "metadata": {"a": "b"}}
    events = events_of(http, **body)
    whole = json.loads(http.post("/v1/responses", json={**body, **PAST_EOS}).content)
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*begin, *["output_text.delta"] * len(deltas), *end]
    assert len(deltas) > 3
    text = "".join(deltas)
    done, part, item, last = events[-4:]
    assert text == done.text == part.part.text == item.item.content[0].text == whole["output"][0]["content"][0]["text"]
    assert last.response.output == [item.item]
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.item.id}
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.response.id}
    assert events[0].response.status == "in_progress"
    assert events[0].response.usage is None
    shown = last.response.model_dump(mode="json", exclude_unset=True)
    for changing in ("id", "created_at", "completed_at", "output", "usage"):
        shown.pop(changing), whole.pop(changing)
    assert shown == whole


def test_the_client_s_own_stream(client: openai.OpenAI) -> None:
    seen = []
    with client.responses.stream(
        model="tiny", input="hello", max_output_tokens=9, extra_body={**PAST_EOS, "seed": 2}
    ) as stream:
        for event in stream:
            seen.append(event.type)
    plain = create(client, max_output_tokens=9, extra_body={**PAST_EOS, "seed": 2})
    assert seen[-1] == "response.incomplete"
    chunks = create(client, stream=True, max_output_tokens=9, extra_body={**PAST_EOS, "seed": 2})
    text = "".join(event.delta for event in chunks if event.type == "response.output_text.delta")
    assert text == plain.output_text


async def test_the_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.responses.create(model="tiny", input="hello", max_output_tokens=4)
        assert answer.output_text is not None
        async for event in await client.responses.create(model="tiny", input="hi", max_output_tokens=4, stream=True):
            last = event
        assert last.type in ("response.incomplete", "response.completed")


def test_a_conversation_goes_on_with_our_own_items(client: openai.OpenAI) -> None:
    first = create(client)
    again: Any = [*HELLO, *[item.model_dump() for item in first.output], *HELLO]
    answer = create(client, input=again)
    assert answer.usage.input_tokens > first.usage.input_tokens + 8
    dumped: Any = [*HELLO, *[item.model_dump(exclude_none=True) for item in first.output], *HELLO]
    assert create(client, input=dumped).usage.input_tokens == answer.usage.input_tokens


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 7}, "input"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
    ({"input": "hello " * 500}, "input"),
    ({"instructions": 7}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 2**63}, "max_output_tokens"),
    ({"messages": HELLO}, "messages"),
    ({"n": 2}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 7}, "top_p"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"background": True}, "background"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"truncation": "auto"}, "truncation"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"reasoning": {"effort": "a lot"}}, "reasoning.effort"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_not_honoured_is_refused_by_name(
    http: httpx.Client, body: dict[str, Any], param: str, stream: bool
) -> None:
    answer = http.post("/v1/responses", json={"input": "hello", "stream": stream, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "\n" not in error["message"]


def test_what_changes_nothing_is_accepted(http: httpx.Client) -> None:
    same = {
        "background": False,
        "include": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None},
        "service_tier": "auto",
        "store": True,
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
    }
    answer = http.post("/v1/responses", json={"input": "hello", "max_output_tokens": 2, **same})
    assert answer.status_code == 200, answer.text
    assert validated(Response, answer.content).prompt_cache_key == "k"


def test_other_models_are_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        create(client, model="gpt-9")


def test_a_response_that_is_aborted_or_fails(start: Callable[..., Server], model_path: Path) -> None:
    server = start(fake(model_path, delay=0.02))
    body = {"input": "hello", "ignore_eos": True, "stream": True}

    def kinds_after(then: Callable[[str], object]) -> list[Any]:
        events: list[Any] = []
        with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(validated(ResponseStreamEvent, line.removeprefix("data: ")))
                    if len(events) == 8:
                        then(events[0].response.id)
        return events

    aborted = kinds_after(lambda rid: httpx.post(f"{server.url}/abort_request", json={"rid": rid}))[-1]
    assert (aborted.type, aborted.response.status) == ("response.incomplete", "cancelled")
    failed = kinds_after(lambda _: server.child("minisgl-TP0-scheduler").kill())[-1]
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert "minisgl-TP0-scheduler" in failed.response.error.message


class Verdict(pydantic.BaseModel):
    good: bool
    marks: Literal[1, 2, 3]


def test_parsed_responses_have_the_form_that_is_asked_for(client: openai.OpenAI, http: httpx.Client) -> None:
    made = client.responses.parse(
        model="tiny", input="hello", text_format=Verdict, max_output_tokens=200, temperature=0
    )
    assert isinstance(made.output_parsed, Verdict)
    assert made.status == "completed"
    assert made.text is not None
    assert made.text.format is not None
    assert made.text.format.type == "json_schema"
    bad = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}
    answer = http.post("/v1/responses", json={"input": "hello", "text": {"format": bad}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text.format")
