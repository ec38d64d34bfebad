"""Tools and reasoning through real processes and the stock OpenAI client; the model's words come from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import Server, fake
from tests.tokenizers_fixture import make_byte_level

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if forbidden %}{{ raise_exception('forbidden') }}{% endif %}"
    "<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}"
)
HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Köln 🌧"}}\n</tool_call>'


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str


TOOLS: Any = [openai.pydantic_function_tool(GetWeather)]


class Model:
    """A server and what its model says."""

    def __init__(self, server: Server, answer: Path) -> None:
        self.client = server.client()
        self._answer = answer

    def chat(self, says: str, **options: Any) -> Any:
        self._answer.write_text(says, encoding="utf-8")
        return self.client.chat.completions.create(**{"model": "fake-model", "messages": HELLO, **options})

    def stream(self, says: str, **options: Any) -> Any:
        """What the client's own accumulation makes of a stream."""
        self._answer.write_text(says, encoding="utf-8")
        defaults: dict[str, Any] = {"model": "fake-model", "messages": HELLO}
        with self.client.chat.completions.stream(**{**defaults, **options}) as stream:
            return list(stream), stream.get_final_completion()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    directory = tmp_path_factory.mktemp("tools")
    path = make_byte_level(directory / "model", template=TEMPLATE)
    answer = directory / "answer.txt"
    server = Server(fake(path, answer=answer, tools="hermes", reasoning="qwen3"), directory / "server.log")
    made = Model(server, answer)
    yield made
    made.client.close()
    server.close()
    assert "Traceback" not in server.output()


def test_a_call(model: Model) -> None:
    choice = model.chat(f"I look.\n{CALL}", tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "GetWeather")
    assert json.loads(call.function.arguments) == {"city": "Köln 🌧"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    again = model.chat("It rains.", messages=[*HELLO, choice.message.model_dump(), result], tools=TOOLS)
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("It rains.", "stop")


def test_calls_stream(model: Model) -> None:
    chunks = list(model.chat(f"I look.\n{CALL}{CALL}", tools=TOOLS, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in deltas] == [0, 0, 1, 1]
    assert deltas[0].id and deltas[0].function.name == "GetWeather" and deltas[1].id is None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_client_s_own_stream_parses_the_arguments(model: Model) -> None:
    events, completion = model.stream(CALL, tools=TOOLS)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [GetWeather(city="Köln 🌧")]
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.parsed_arguments == GetWeather(city="Köln 🌧")


def test_parse(model: Model) -> None:
    model._answer.write_text(CALL, encoding="utf-8")
    parsed = model.client.chat.completions.parse(model="fake-model", messages=HELLO, tools=TOOLS).choices[0].message
    assert parsed.tool_calls is not None
    assert parsed.tool_calls[0].function.parsed_arguments == GetWeather(city="Köln 🌧")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("says", [CALL.replace("GetWeather", "GetLost"), CALL[:-20], "<tool_call>\n{}</tool_call>"])
def test_what_is_no_call_is_content(model: Model, says: str, stream: bool) -> None:
    if stream:
        chunks = [chunk.choices[0] for chunk in model.chat(says, tools=TOOLS, stream=True)]
        content, finish = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        choice = model.chat(says, tools=TOOLS).choices[0]
        assert choice.message.tool_calls is None
        content, finish = choice.message.content, choice.finish_reason
    assert (content, finish) == (says, "stop")


def test_without_tools_nothing_is_a_call(model: Model) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        choice = model.chat(CALL, **options).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_one_call_only(model: Model) -> None:
    message = model.chat(CALL + CALL, tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert len(message.tool_calls) == 1


def test_n_choices_have_their_own_calls(model: Model) -> None:
    choices = model.chat(CALL, tools=TOOLS, n=3).choices
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3
    chunks = model.chat(CALL, tools=TOOLS, n=3, stream=True)
    names = [
        (c.index, call.function.name) for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []
    ]
    assert sorted(name for name in names if name[1]) == [(index, "GetWeather") for index in range(3)]


def test_reasoning(model: Model) -> None:
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
def test_reasoning_that_the_prompt_has_opened(model: Model, stream: bool) -> None:
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
    ("options", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "GetLost"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
        ({"extra_body": {"chat_template_kwargs": {"forbidden": True}}}, "messages"),
    ],
)
def test_refusals(model: Model, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        model.chat("x", **options)
    assert caught.value.param == param


def test_tools_need_a_known_format(start: Callable[..., Server], model_path: Path) -> None:
    with start(fake(model_path)).client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake-model", messages=HELLO, tools=TOOLS)
    assert caught.value.param == "tools"
    assert "--tool-call-parser" in str(caught.value)


def test_structured_output_is_no_reasoning(start: Callable[..., Server]) -> None:
    """Though this parser takes all that comes before `</think>` for such."""
    server = start(["-m", "minisgl", "--port", "0", "--reasoning-parser", "deepseek_r1"])
    with server.client() as client:
        made = client.chat.completions.create(
            model="minisgl-demo",
            messages=HELLO,
            temperature=0,
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "additionalProperties": False}},
            },
        )
    assert json.loads(made.choices[0].message.content or "") == {}
