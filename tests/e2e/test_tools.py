"""Tools and reasoning through real processes and the stock OpenAI client; the model's words come from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel

from tests.e2e.conftest import Scripted, Server

HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Köln 🌧"}}\n</tool_call>'


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str


TOOLS: Any = [openai.pydantic_function_tool(GetWeather)]


def test_a_call(model: Scripted) -> None:
    choice = model.chat(f"I look.\n{CALL}", tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "GetWeather")
    assert json.loads(call.function.arguments) == {"city": "Köln 🌧"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    again = model.chat("It rains.", messages=[*HELLO, choice.message.model_dump(), result], tools=TOOLS)
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("It rains.", "stop")


def test_calls_stream(model: Scripted) -> None:
    chunks = list(model.chat(f"I look.\n{CALL}{CALL}", tools=TOOLS, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    for index in (0, 1):  # each begins with its name, and its arguments follow in pieces
        first, *rest = [call for call in deltas if call.index == index]
        assert first.id and first.function.name == "GetWeather" and not first.function.arguments
        assert rest and not any(call.id or call.function.name for call in rest)
        assert json.loads("".join(call.function.arguments for call in rest)) == {"city": "Köln 🌧"}
    assert [call.index for call in deltas] == sorted(call.index for call in deltas)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_client_s_own_stream_parses_the_arguments(model: Scripted) -> None:
    events, completion = model.stream(CALL, tools=TOOLS)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [GetWeather(city="Köln 🌧")]
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.parsed_arguments == GetWeather(city="Köln 🌧")


def test_parse(model: Scripted) -> None:
    model.says(CALL)
    parsed = model.client.chat.completions.parse(model="fake-model", messages=HELLO, tools=TOOLS).choices[0].message
    assert parsed.tool_calls is not None
    assert parsed.tool_calls[0].function.parsed_arguments == GetWeather(city="Köln 🌧")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("says", [CALL.replace("GetWeather", "GetLost"), CALL[:25], "<tool_call>\n{}</tool_call>"])
def test_what_is_no_call_is_content(model: Scripted, says: str, stream: bool) -> None:
    if stream:
        chunks = [chunk.choices[0] for chunk in model.chat(says, tools=TOOLS, stream=True)]
        content, finish = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        choice = model.chat(says, tools=TOOLS).choices[0]
        assert choice.message.tool_calls is None
        content, finish = choice.message.content, choice.finish_reason
    assert (content, finish) == (says, "stop")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_that_is_cut_off_has_the_arguments_so_far(model: Scripted, stream: bool) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "max_tokens": len(CALL[: CALL.index(" 🌧")].encode())}
    if stream:
        state = ChatCompletionStreamState()
        for chunk in model.chat(CALL, **asked, stream=True):
            state.handle_chunk(chunk)
        choice: Any = state.current_completion_snapshot.choices[0]
    else:
        choice = model.chat(CALL, **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "length" and not choice.message.content
    arguments = call.function.arguments.rstrip("\ufffd")  # half of a character
    assert '{"city": "Köln 🌧"}'.startswith(arguments) and arguments.startswith('{"city": "K')


def test_without_tools_nothing_is_a_call(model: Scripted) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        choice = model.chat(CALL, **options).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_one_call_only(model: Scripted) -> None:
    message = model.chat(CALL + CALL, tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert len(message.tool_calls) == 1


def test_n_choices_have_their_own_calls(model: Scripted) -> None:
    choices = model.chat(CALL, tools=TOOLS, n=3).choices
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3
    chunks = model.chat(CALL, tools=TOOLS, n=3, stream=True)
    names = [
        (c.index, call.function.name) for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []
    ]
    assert sorted(name for name in names if name[1]) == [(index, "GetWeather") for index in range(3)]


def test_reasoning(model: Scripted) -> None:
    says = f"<think>\nShall I? {CALL}\n</think>\n\nYes.\n{CALL}"
    message = model.chat(says, tools=TOOLS).choices[0].message
    assert message.model_extra == {"reasoning_content": f"Shall I? {CALL}"}
    assert (message.content, len(message.tool_calls)) == ("Yes.", 1)
    deltas = [chunk.choices[0].delta for chunk in model.chat(says, tools=TOOLS, stream=True)]
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == f"Shall I? {CALL}"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    again = model.chat("Good.", messages=[*HELLO, message.model_dump(), *HELLO]).choices[0].message
    assert (again.content, again.model_extra) == ("Good.", {})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_reasoning_that_the_prompt_has_opened(model: Scripted, stream: bool) -> None:
    options = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    if stream:
        deltas = [chunk.choices[0].delta for chunk in model.chat("Hm.\n</think>\n\nYes.", stream=True, **options)]
        reasoning = "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        message = model.chat("Hm.\n</think>\n\nYes.", **options).choices[0].message
        reasoning, content = message.model_extra["reasoning_content"], message.content
    assert (reasoning, content) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    ("begun", "says", "reasoning", "content"),
    [
        ("The sum", " is 7.", None, " is 7."),
        ("<think>Hm.</think>", "7.", None, "7."),
        ("<think>Let me", " see.</think>7.", "see.", "7."),
    ],
)
def test_a_message_that_goes_on(model: Scripted, begun: str, says: str, reasoning: str | None, content: str) -> None:
    """The answer is the rest: reasoning only where the message breaks off in it."""
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": begun}]
    made = model.chat(says, messages=messages, extra_body={"continue_final_message": True})
    message = made.choices[0].message
    assert getattr(message, "reasoning_content", None) == reasoning
    assert message.content == content


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "GetLost"}}}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
        ({"extra_body": {"chat_template_kwargs": {"forbidden": True}}}, "messages"),
    ],
)
def test_refusals(model: Scripted, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        model.chat("x", **options)
    assert caught.value.param == param


def test_tools_need_a_known_format(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
    assert caught.value.param == "tools"
    assert "--tool-call-parser" in str(caught.value)


THINK, THOUGHT = "7", "8"  # the built-in model's ids of the tags, which it does not use by itself


def test_the_answer_has_its_form_after_the_reasoning(start: Callable[..., Server]) -> None:
    server = start(["-m", "minisgl", "--port", "0", "--reasoning-parser", "qwen3", "--max-seq-len", "1024"])
    schema: dict[str, Any] = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    function: Any = {"type": "function", "function": {"name": "report", "parameters": schema}}
    asked: dict[str, Any] = {"model": "minisgl-demo", "messages": HELLO, "max_tokens": 900}
    with server.client() as client:

        def answers(**options: Any) -> list[Any]:
            """To the question asked a few times: it thinks, now more, now less."""
            made = [
                client.chat.completions.create(
                    **asked, **options, seed=strength, logit_bias={THINK: 100, THOUGHT: strength}
                )
                for strength in (16, 19, 22, 25)
            ]
            assert any((one.choices[0].message.model_extra or {}).get("reasoning_content") for one in made)
            for one in made:
                assert one.usage is not None and one.usage.completion_tokens_details is not None
                thought = one.usage.completion_tokens_details.reasoning_tokens
                assert thought is not None and thought <= one.usage.completion_tokens
                assert thought >= 3 or not one.choices[0].message.model_extra
            return [one.choices[0] for one in made]

        for choice in answers(response_format=form):
            assert isinstance(json.loads(choice.message.content)["ok"], bool)
        for choice in answers(tools=[function], tool_choice="required"):
            assert choice.finish_reason == "tool_calls"
            for call in choice.message.tool_calls:
                assert isinstance(json.loads(call.function.arguments)["ok"], bool)
        plain = client.chat.completions.create(**asked, temperature=0, response_format=form).choices[0].message
        assert json.loads(plain.content or "").keys() == {"ok"} and not plain.model_extra
