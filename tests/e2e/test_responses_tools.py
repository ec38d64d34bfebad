"""Tools and reasoning in /v1/responses, with the stock client and its types; the model's words come from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from tests.e2e.conftest import Scripted, Server
from tests.strictly import validated

HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Köln 🌧"}}\n</tool_call>'
OTHER = CALL.replace("Köln 🌧", "Oslo")


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str


PARSED_TOOLS: Any = [openai.pydantic_function_tool(GetWeather)]
TOOLS: Any = [{"type": "function", "strict": True, **PARSED_TOOLS[0]["function"]}]


def create(model: Scripted, says: str, **options: Any) -> Any:
    model.says(says)
    return model.client.responses.create(**{"model": "fake-model", "input": HELLO, **options})


def both(model: Scripted, says: str, **body: Any) -> tuple[Any, list[Any]]:
    """The whole answer and the events, each checked strictly, after a look at what they have in common."""
    model.says(says)
    asked = {"input": HELLO, **body}
    with httpx.Client(base_url=model.url, timeout=60) as http:
        whole = validated(Response, http.post("/v1/responses", json=asked).content)
        text = http.post("/v1/responses", json={**asked, "stream": True}).text
    events = [validated(ResponseStreamEvent, frame.split("data: ")[1]) for frame in text.split("\n\n")[:-1]]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    added = [event for event in events if event.type == "response.output_item.added"]
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in added] == [event.output_index for event in done]
    assert [event.output_index for event in done] == list(range(len(last.output)))
    assert [event.item for event in done] == last.output
    for index, (begun, item) in enumerate(zip(added, last.output, strict=True)):
        assert (begun.item.id, begun.item.type, begun.item.status) == (item.id, item.type, "in_progress")
        own = [event for event in events if getattr(event, "output_index", None) == index]
        assert {getattr(event, "item_id", item.id) for event in own} == {item.id}
        deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
    assert [shown(item) for item in whole.output] == [shown(item) for item in last.output]
    assert (counted(whole), whole.tools, whole.tool_choice) == (counted(last), last.tools, last.tool_choice)
    return whole, events


def counted(response: Any) -> dict[str, Any]:
    """Its usage, but for the tokens of reasoning: they are counted by what arrives together, which differs."""
    usage: dict[str, Any] = response.usage.model_dump()
    assert 0 <= usage["output_tokens_details"].pop("reasoning_tokens") <= usage["output_tokens"]
    return usage


def shown(item: Any) -> dict[str, Any]:
    """What does not differ from one answer to the next."""
    return {name: value for name, value in item.model_dump().items() if name not in ("id", "call_id")}


def kinds(events: list[Any]) -> list[str]:
    """Without repetitions."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def test_a_conversation_with_a_tool(model: Scripted) -> None:
    answer = create(model, f"I look.\n{CALL}", tools=TOOLS)
    message, call = answer.output
    assert (answer.status, answer.output_text) == ("completed", "I look.")
    assert (message.status, call.type, call.status, call.name) == (
        "completed", "function_call", "completed", "GetWeather",
    )  # fmt: skip
    assert json.loads(call.arguments) == {"city": "Köln 🌧"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    again = create(model, "It rains.", input=[*HELLO, *answer.output, result], tools=TOOLS)
    assert again.output_text == "It rains."
    chat_call = {"id": "x", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": "I look.", "tool_calls": [chat_call]},
        {"role": "tool", "tool_call_id": "x", "content": "It rains."},
    ]
    chat = model.chat("It rains.", messages=messages)
    assert again.usage.input_tokens == chat.usage.prompt_tokens


def test_events_of_calls(model: Scripted) -> None:
    whole, events = both(model, f"I look.\n{CALL}\n{OTHER}", tools=TOOLS, tool_choice="auto")
    of_call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds(events) == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *of_call,
        *of_call,
        "completed",
    ]
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    assert len({item.id for item in whole.output}) == len({item.call_id for item in whole.output[1:]}) + 1 == 3
    assert whole.tools[0].name == "GetWeather"
    assert whole.tools[0].parameters == TOOLS[0]["parameters"]
    called, _ = both(model, CALL, tools=[{"type": "function", "name": "GetWeather"}], parallel_tool_calls=False)
    assert [item.type for item in called.output] == ["function_call"]
    assert called.parallel_tool_calls is False


def test_events_of_reasoning(model: Scripted) -> None:
    whole, events = both(model, f"<think>\nShall I? {CALL}\n</think>\n\nYes.\n{CALL}", tools=TOOLS)
    part = ("output_item.added", "content_part.added")
    end = ("content_part.done", "output_item.done")
    assert kinds(events)[2:12] == [
        *(*part, "reasoning_text.delta", "reasoning_text.done", *end),
        *(*part, "output_text.delta", "output_text.done"),
    ]
    reasoning, message, call = whole.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", f"Shall I? {CALL}")
    assert (message.content[0].text, call.name) == ("Yes.", "GetWeather")
    assert 10 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
    again = create(model, "Good.", input=[*HELLO, *whole.output, *HELLO])
    assert [item.type for item in again.output] == ["message"]
    assert again.usage.output_tokens_details.reasoning_tokens == 0


def test_reasoning_that_the_prompt_has_opened_and_that_is_cut_off(model: Scripted) -> None:
    body = {"chat_template_kwargs": {"thinking": True}}
    whole, _ = both(model, "Hm.\n</think>\n\nYes.", **body)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    cut, events = both(model, "Hm, this takes long", max_output_tokens=5, **body)
    assert (cut.status, events[-1].type) == ("incomplete", "response.incomplete")
    (reasoning,) = cut.output
    assert (reasoning.type, reasoning.status) == ("reasoning", "incomplete")
    assert cut.usage.output_tokens_details.reasoning_tokens == 5
    empty, _ = both(model, "")
    assert (empty.output[0].type, empty.output_text) == ("message", "")


def test_the_client_s_own_stream_parses_the_arguments(model: Scripted) -> None:
    model.says(f"<think>\nHm.\n</think>\n\n{CALL}")
    with model.client.responses.stream(model="fake-model", input=HELLO, tools=PARSED_TOOLS) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    reasoning, call = final.output
    assert reasoning.type == "reasoning"
    assert call.type == "function_call"
    assert call.parsed_arguments == GetWeather(city="Köln 🌧")
    assert snapshots[-1] == call.arguments
    parsed = model.client.responses.parse(model="fake-model", input=HELLO, tools=PARSED_TOOLS).output[1]
    assert parsed.type == "function_call"
    assert parsed.parsed_arguments == GetWeather(city="Köln 🌧")
    goes_on: Any = [*HELLO, *final.output, {"type": "function_call_output", "call_id": call.call_id, "output": "x"}]
    assert create(model, "Yes.", input=goes_on, tools=TOOLS).output_text == "Yes."


def test_without_tools_nothing_is_a_call(model: Scripted) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        answer = create(model, CALL, **options)
        assert [item.type for item in answer.output] == ["message"]
        assert answer.output_text == CALL
    one = create(model, CALL + OTHER, tools=TOOLS, parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["function_call"]


def test_tools_need_a_known_format(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input=HELLO, tools=TOOLS)
    assert caught.value.param == "tools"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("logs") / "demo.log"
    server = Server(["-m", "minisgl", "--port", "0", "--reasoning-parser", "deepseek_r1"], log)
    with server.client() as client:
        yield client
    server.close()
    assert "Traceback" not in server.output()


class GetTemperature(BaseModel):
    """Get the weather in a city."""

    city: str
    unit: int


CALM: dict[str, Any] = {"model": "minisgl-demo", "temperature": 0, "max_output_tokens": 200}
NOT_THINKING: Any = {"logit_bias": {"8": 100}}  # the first token closes the reasoning, which this parser takes for open


def test_the_built_in_model_calls_a_tool(start: Callable[..., Server]) -> None:
    server = start(["-m", "minisgl", "--port", "0", "--max-seq-len", "1024"])
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    description = "Get the weather in a city."
    tools: Any = [{"type": "function", "name": "get_weather", "description": description, "parameters": parameters}]
    conversation: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with server.client() as client:
        answer = client.responses.create(input=conversation, tools=tools, **CALM)
        (call,) = answer.output
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
        conversation += [*answer.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
        assert "sunny" in client.responses.create(input=conversation, tools=tools, **CALM).output_text
        for choice in ("required", {"type": "function", "name": "get_weather"}):  # though nothing asks for a call
            made = client.responses.create(input="hello", tools=tools, tool_choice=choice, **CALM)  # type: ignore[arg-type]
            call = made.output[0]
            assert call.type == "function_call"
            assert isinstance(json.loads(call.arguments)["city"], str)
            echoed = made.tool_choice if isinstance(made.tool_choice, str) else made.tool_choice.model_dump()
            assert echoed == choice


def test_forms_are_followed_after_the_reasoning(demo: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(GetTemperature)]
    options: dict[str, Any] = {**CALM, "extra_body": NOT_THINKING}
    parsed = demo.responses.parse(input="hello", text_format=GetTemperature, **options)
    assert isinstance(parsed.output_parsed, GetTemperature)
    called = demo.responses.parse(input="hello", tools=tools, tool_choice="required", **options).output[0]
    assert called.type == "function_call"
    assert isinstance(called.parsed_arguments, GetTemperature)
