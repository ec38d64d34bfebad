"""What /v1/messages makes of a body, and of a call that is cut off."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.messages import ChatPrompt, TokenizeMsg, UserReply, pack_ids, tokenizer_codec
from minisgl.parser.parts import Parser, Part
from minisgl.server.answers.messages import MessagesRenderer
from minisgl.server.answers.renderer import Assembler
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.bodies.messages import parse_messages

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ASKED: Any = {"role": "user", "content": "a"}


def chat(**body: Any) -> ChatPrompt:
    prompt = parse_messages(json.dumps({"messages": [ASKED], **body}).encode(), {}).prompts[0]
    assert isinstance(prompt, ChatPrompt)
    return prompt


def test_tools_by_the_names_of_chats() -> None:
    """A schema by another name is taken; a tool whose description the model would not see is refused."""
    (tool,) = chat(tools=[{"name": "f", "parameters": {"type": "object"}}], max_tokens=16.0).tools or ()
    assert tool["function"] == {"name": "f", "parameters": {"type": "object"}}
    with pytest.raises(RequestError) as refusal:
        chat(tools=[{"type": "function", "function": {"name": "f"}}])
    assert refusal.value.param == "tools[0].function"


def test_the_shape_of_an_answer_in_any_form() -> None:
    shapes = [
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_format": {"type": "json_schema", "schema": SCHEMA, "name": "a"}},
        {"output_config": {"format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}},
    ]
    for shape in shapes:
        grammar = parse_messages(json.dumps({"messages": [ASKED], **shape}).encode(), {}).params.grammar
        assert grammar is not None and json.loads(grammar.text) == SCHEMA
    for wrong in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": SCHEMA}):
        with pytest.raises(RequestError) as refusal:
            chat(output_config={"format": wrong})
        assert str(refusal.value.param).startswith("output_config.format")


def test_turns_are_messages() -> None:
    """As templates have them: results before what the user says to them, arguments as objects."""
    turns = [
        ASKED,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "b", "signature": "s"},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}, "cache_control": None},
                {"type": "tool_use", "id": "2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "d", "cache_control": {"type": "ephemeral"}},
                {
                    "type": "tool_result",
                    "tool_use_id": "2",
                    "content": [{"type": "text", "text": "e"}],
                    "is_error": True,
                },
                {"type": "text", "text": "f"},
                {"type": "search_result", "title": "g", "source": "h", "content": [{"type": "text", "text": "i"}]},
            ],
        },
    ]

    def call(name: str, call_id: str, arguments: Any) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert chat(messages=turns, system=[{"type": "text", "text": "s"}]).messages == [
        {"role": "system", "content": "s"},
        ASKED,
        {
            "role": "assistant",
            "content": "c",
            "tool_calls": [call("f", "1", {"x": 1}), call("g", "2", {})],
            "reasoning_content": "b",
        },
        {"role": "tool", "content": "d", "tool_call_id": "1"},
        {"role": "tool", "content": "Error: e", "tool_call_id": "2"},
        {"role": "user", "content": "f\ng\nh\ni"},
    ]


def test_an_assistant_s_last_words_go_on_unless_they_are_calls() -> None:
    said = {"role": "assistant", "content": "b"}
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
    assert [chat(messages=[ASKED, *last]).continue_final for last in ([said], [called], [said, ASKED])] == [1, 0, 0]


class Calling(Parser):
    """Whatever is written are the arguments of one call."""

    def push(self, text: str) -> list[Part]:
        return [Part("call", text, "f")] if text else []


@pytest.mark.parametrize(
    ("written", "shown"), [('{"a": [1, "b', {"a": [1]}), ("{", {}), ("[1", {}), ("", {}), ("}", {})]
)
def test_a_call_that_is_cut_off_is_an_object_as_far_as_it_came(written: str, shown: dict[str, Any]) -> None:
    """`max_tokens` makes it end anywhere."""
    asked = GenerationRequest((chat(),), SamplingParams())
    renderer = MessagesRenderer("m", asked, lambda: Assembler(None, Calling()))
    reply = UserReply(1, written, pack_ids([1]), 1, 1, 0, finish_reason=FinishReason.LENGTH)
    renderer.last[0] = reply
    made = renderer.body([[reply]])
    assert made["stop_reason"] == "max_tokens"
    assert [block.get("input") for block in made["content"]] == ([shown] if written else [None])


words = st.sampled_from(
    ["text", "tool_use", "tool_result", "thinking", "image", "document", "search_result", "user", "f"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "text", "content", "source", "data", "id", "name", "input", "tool_use_id", "title"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": values})


@given(st.lists(turns, max_size=3), values, values, values)
def test_whatever_is_taken_can_be_sent_on(messages: Any, system: Any, tools: Any, choice: Any) -> None:
    body = {"messages": messages, "system": system, "tools": tools, "tool_choice": choice}
    with contextlib.suppress(RequestError):
        parsed = parse_messages(json.dumps(body).encode(), {})
        sent = TokenizeMsg(1, parsed.prompts[0], parsed.params)
        assert tokenizer_codec.decode(tokenizer_codec.encode([sent])) == [sent]
