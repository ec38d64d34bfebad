"""Tools beside an answer that has a form of its own, and demanded calls: `openai` and the built-in model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.prompts import ANNA, GET_WEATHER, MODEL
from tests.e2e.conftest import Server

CITIES = ("Paris", "Rome", "Berlin", "London", "Madrid", "Tokyo")
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
# What pydantic says of the library's own generic classes when they are made JSON again.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):
    """Get the weather in a city."""

    city: str


@pytest.fixture
def client(demo: Server) -> Iterator[openai.OpenAI]:
    with demo.client() as made:
        yield made


def weather(city: str) -> Any:
    return [{"role": "user", "content": f"What is the weather in {city}?"}]


FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_object", "schema": Person.model_json_schema()}},
    {"extra_body": {"structured_outputs": {"json": Person.model_json_schema(), "whitespace": "any"}}},
    {"extra_body": {"structured_outputs": {"regex": r"\{\"name\": \"Anna\", \"age\": [0-9]+\}"}}},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form)[:60])
def test_the_model_still_calls_and_still_answers(client: openai.OpenAI, form: dict[str, Any]) -> None:
    for city in CITIES:
        choice = client.chat.completions.create(**GREEDY, messages=weather(city), tools=[GET_WEATHER], **form).choices[
            0
        ]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        assert json.loads(call.function.arguments) == {"city": city}  # type: ignore[union-attr]
    answer = client.chat.completions.create(**GREEDY, messages=ANNA, tools=[GET_WEATHER], **form).choices[0]
    assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
    assert json.loads(answer.message.content or "") == {"name": "Anna", "age": 31}


@pytest.mark.parametrize("stream", [False, True])
def test_parsed_answers_and_calls(client: openai.OpenAI, stream: bool) -> None:
    tool: Any = openai.pydantic_function_tool(get_weather)

    def ask(messages: Any) -> Any:
        asked: dict[str, Any] = {**GREEDY, "messages": messages, "tools": [tool], "response_format": Person}
        if not stream:
            return client.chat.completions.parse(**asked).choices[0].message
        with client.chat.completions.stream(**asked) as events:
            return events.get_final_completion().choices[0].message

    assert ask(ANNA).parsed == Person(name="Anna", age=31)
    called = ask(weather("Rome"))
    assert called.parsed is None and called.tool_calls[0].function.name == "get_weather"
    assert called.tool_calls[0].function.parsed_arguments == get_weather(city="Rome")


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_in_responses(client: openai.OpenAI, stream: bool) -> None:
    tool: Any = {"type": "function", **GET_WEATHER["function"]}

    def ask(messages: Any, **more: Any) -> Any:
        asked: dict[str, Any] = {**GREEDY, "input": messages, "tools": [tool], "text_format": Person, **more}
        if not stream:
            return client.responses.parse(**asked)
        with client.responses.stream(**asked) as events:
            return events.get_final_response()

    assert ask(ANNA).output_parsed == Person(name="Anna", age=31)
    for choice in ("auto", "required", {"type": "function", "name": "get_weather"}):
        (call,) = ask(weather("Rome"), tool_choice=choice).output
        assert (call.type, json.loads(call.arguments)) == ("function_call", {"city": "Rome"})
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    assert ask(weather("Rome"), tool_choice=allowed).output[0].type == "function_call"
    assert ask(ANNA, tool_choice="none").output_parsed == Person(name="Anna", age=31)


def test_a_form_says_nothing_of_demanded_calls_and_all_without_tools(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "tools": [GET_WEATHER], "response_format": {"type": "json_object"}}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", "any", "get_weather", named, {"type": "function", "name": "get_weather"}):
        message = (
            client.chat.completions.create(**asked, messages=weather("Rome"), tool_choice=choice).choices[0].message
        )
        assert message.content is None and message.tool_calls
    only = client.chat.completions.create(**asked, messages=weather("Rome"), tool_choice="none", max_tokens=60).choices[
        0
    ]
    assert only.message.tool_calls is None and (only.message.content or "").startswith("{")


LIST: Any = {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}, "maxItems": 2}
SHAPES: list[tuple[Any, Any]] = [
    ("no_schema", None),
    ("no_properties", {"type": "object"}),
    ("empty", {"type": "object", "properties": {}}),
    ("typeless", {}),
    ("one", {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}}),
    ("deep", {"type": "object", "properties": {"points": LIST}, "required": ["points"]}),
]


@pytest.mark.parametrize(("name", "parameters"), SHAPES, ids=lambda value: str(value)[:12])
def test_demanded_calls_invent_no_arguments(client: openai.OpenAI, name: str, parameters: Any) -> None:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    tools: Any = [{"type": "function", "function": function}]
    known = (parameters or {}).get("properties", {})
    made = client.chat.completions.create(
        **{**GREEDY, "temperature": 1.5},
        messages=weather("Rome"),
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        n=6,
        max_tokens=200,
    )
    for choice in made.choices:
        if choice.finish_reason != "length":
            (call,) = choice.message.tool_calls or ()
            arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
            assert set(arguments) <= set(known)
            assert all(set(point) <= {"x"} for point in arguments.get("points", ()))


def test_pieces_of_arguments(client: openai.OpenAI) -> None:
    """A call is there before its arguments are, in both APIs, and these add up."""
    asked: Any = {**GREEDY, "stream": True}
    chunks = list(client.chat.completions.create(**asked, messages=weather("Rome"), tools=[GET_WEATHER]))
    pieces = [call.function.arguments for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0] == "" and json.loads("".join(pieces)) == {"city": "Rome"}
    flat: Any = {"type": "function", **GET_WEATHER["function"]}
    events = list(client.responses.create(**asked, input=weather("Rome"), tools=[flat]))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == {"city": "Rome"}
