"""Conversations of /v1/responses are the chats that say the same; what is none of them is refused by name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.config.locate import DEMO_MODEL
from minisgl.errors import RequestError
from minisgl.message.messages import TokenizeMsg, tokenizer_codec
from minisgl.server.answers.renderer import Assembler
from minisgl.server.answers.responses import ResponsesRenderer
from minisgl.server.bodies.chat import parse_chat
from minisgl.server.bodies.responses import ResponsesRequest, parse_responses
from minisgl.tokenizer.tokenize import HFTextCodec

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": PARAMETERS, "strict": True}
FUNCTION = {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}
REASONING = {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
CALL = {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "c1", "name": "get_weather"}
CALL["arguments"] = '{"city": "Paris"}'
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
CHAT_OUTPUT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def said(text: str) -> dict[str, Any]:
    """Our own item."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}


def parse(**body: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"input": "hello", **body}).encode(), {})


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([CALL, OUTPUT], [{"role": "assistant", "tool_calls": [CHAT_CALL]}, CHAT_OUTPUT]),
        (
            [said("I look."), CALL, CALL, OUTPUT, OUTPUT, said("Sun.")],
            [
                {"role": "assistant", "content": "I look.", "tool_calls": [CHAT_CALL, CHAT_CALL]},
                CHAT_OUTPUT,
                CHAT_OUTPUT,
                {"role": "assistant", "content": "Sun."},
            ],
        ),
        (
            [REASONING, said("I look."), CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "sunny"}]}],
            [
                {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [CHAT_CALL]},
                CHAT_OUTPUT,
            ],
        ),
        ([REASONING, CALL], [{"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [CHAT_CALL]}]),
        (
            [CALL, said(" and"), CALL],
            [{"role": "assistant", "content": " and", "tool_calls": [CHAT_CALL, CHAT_CALL]}],
        ),
        ([said("a"), said("b")], [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ([{"type": "reasoning", "id": "x", "summary": []}, said("a")], [{"role": "assistant", "content": "a"}]),
    ],
)
def test_items_are_messages(items: list[Any], messages: list[Any]) -> None:
    hello = {"role": "user", "content": "hello"}
    parsed = parse(input=[hello, *items], tools=[TOOL], tool_choice="auto")
    chat = parse_chat(json.dumps({"messages": [hello, *messages], "tools": [FUNCTION]}).encode(), {})
    assert parsed.prompts == chat.prompts
    assert parsed.tools == chat.tools
    nulls = [{"created_by": None, "namespace": None, "phase": None, **item} for item in items]
    assert parse(input=[hello, *nulls], tools=[TOOL]).prompts == chat.prompts
    HFTextCodec(str(DEMO_MODEL)).render_chat(parsed.prompts[0])  # type: ignore[arg-type]


def test_choices_of_tools() -> None:
    named = parse(
        tools=[TOOL], tool_choice={"type": "function", "name": "get_weather"}, parallel_tool_calls=False
    ).tools
    assert named is not None
    assert (named.required, named.allowed, named.parallel) == (True, {"get_weather"}, False)
    assert parse(tools=[TOOL], tool_choice="none").tools is None
    assert parse(chat_template_kwargs={"enable_thinking": False}).prompts[0].template_kwargs == {  # type: ignore[union-attr]
        "enable_thinking": False
    }


CASES: list[tuple[dict[str, Any], str]] = [
    ({"input": ["x", CALL]}, "input[0]"),
    ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
    ({"input": [{"type": "banana"}]}, "input[0].type"),
    ({"input": [{**OUTPUT, "output": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].output"),
    ({"tools": [{}]}, "tools[0].name"),
    ({"tools": [{"type": "custom"}]}, "tools[0].name"),
    ({"tools": [FUNCTION]}, "tools[0].name"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"previous_response_id": 7}, "previous_response_id"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": TOOL}, "tools"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom", "name": "other"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "text": {"format": {"type": "json_object", "whitespace": "some"}}}, "text.format"),
]


@pytest.mark.parametrize(("body", "param"), CASES, ids=lambda value: str(value)[:60])
def test_bad_fields_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse(**body)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert str(refusal.value).startswith(param)
    assert "function.name" not in str(refusal.value)


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"role": "user", "content": "a"}, {"type": "item_reference", "id": [1]}]},
        {"input": [{"type": "custom_tool_call", "name": "f", "call_id": "c"}]},
        {"tools": [{"type": ["function"]}, {"type": {}}, {"type": None, "name": "f"}]},
        {"input": [{"role": "user", "content": "a", "id": {"a": 1}}]},
    ],
    ids=str,
)
def test_odd_values_are_no_failure(body: dict[str, Any]) -> None:
    parsed = parse(**body)
    assert ResponsesRenderer("m", parsed, Assembler).id
    assert all(isinstance(item["id"], str) for item in parsed.items)


NAMES = ["type", "role", "content", "id", "name", "arguments", "call_id", "output", "summary", "text", "parameters"]
TYPES = [
    "custom",
    "custom_tool_call",
    "item_reference",
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "function",
    "assistant",
    "reasoning_text",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([*TYPES, "{}"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=8,
)
ITEM = st.fixed_dictionaries({"type": st.sampled_from(TYPES)}, optional=dict.fromkeys(NAMES[1:], JSON))


@settings(deadline=None)
@given(st.lists(ITEM | JSON, max_size=4), JSON, JSON)
def test_whatever_is_taken_can_be_sent_on(items: Any, tools: Any, choice: Any) -> None:
    for body in ({"input": items}, {"tools": [tools, TOOL], "tool_choice": choice}, {"tools": tools}):
        with contextlib.suppress(RequestError):
            parsed = parse(**body)
            ResponsesRenderer("m", parsed, Assembler)
            tokenizer_codec.encode([TokenizeMsg(1, parsed.prompts[0], parsed.params)])
