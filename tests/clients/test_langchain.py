"""LangChain's `langchain-openai` and `langchain-anthropic`, with the built-in model."""

from __future__ import annotations

import re
from functools import reduce
from operator import add
from typing import Any

import anthropic
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.prompts import ANNA, MODEL, SUM, WEATHER, Person
from tests.e2e.conftest import ROOT, Server

# What pydantic says of the `openai` library's own generic classes when LangChain makes them JSON again.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"It is sunny in {city}."


def chat_model(demo: Server, **options: Any) -> ChatOpenAI:
    defaults: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_retries": 0, "stream_usage": True}
    return ChatOpenAI(base_url=f"{demo.url}/v1", api_key="none", **{**defaults, **options})


@pytest.fixture
def model(demo: Server) -> ChatOpenAI:
    return chat_model(demo)


def test_what_the_documents_show(demo: Server, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "howto" / "clients.md").read_text()
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    exec(shown.replace("http://127.0.0.1:1919", demo.url).replace("minisgl-demo", MODEL), {})
    answer, streamed = capsys.readouterr().out.split("\n", 1)
    assert answer and answer == streamed


async def test_all_ways_to_ask_say_the_same(model: ChatOpenAI) -> None:
    whole = model.invoke(SUM)
    assert whole.content == "3 + 4 = 7."
    assert whole.response_metadata["finish_reason"] == "stop"
    streamed: Any = reduce(add, model.stream(SUM))
    assert streamed.content == whole.content
    assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"] > 0  # type: ignore[index]
    assert (await model.ainvoke(SUM)).content == whole.content
    assert "".join([str(chunk.content) async for chunk in model.astream(SUM)]) == whole.content
    questions = [[HumanMessage(f"What is {number} + {number}?")] for number in (2, 13, 40)]
    assert [answer.content for answer in model.batch(questions)] == ["2 + 2 = 4.", "13 + 13 = 26.", "40 + 40 = 80."]


@pytest.mark.parametrize("stream", [False, True])
def test_tools(model: ChatOpenAI, stream: bool) -> None:
    able = model.bind_tools([get_weather])
    message: Any = reduce(add, able.stream(WEATHER)) if stream else able.invoke(WEATHER)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert "sunny" in str(able.invoke([HumanMessage(WEATHER[0]["content"]), message, result]).content)


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_demanded_tools(model: ChatOpenAI, choice: str) -> None:
    able = model.bind_tools([get_weather], tool_choice=choice, strict=True, parallel_tool_calls=False)
    message = able.invoke(SUM)
    assert isinstance(message, AIMessage)
    assert [call["name"] for call in message.tool_calls] == ["get_weather"]


@pytest.mark.parametrize(
    "how",
    [
        {"method": "json_schema"},
        {"method": "json_schema", "strict": True},
        {"method": "function_calling"},
        {"method": "json_mode"},
    ],
    ids=str,
)
def test_structured_output(model: ChatOpenAI, how: dict[str, Any]) -> None:
    able = model.with_structured_output(Person, **how, include_raw=True)
    made = able.invoke(ANNA)
    assert (made["parsed"], made["parsing_error"]) == (Person(name="Anna", age=31), None)  # type: ignore[index]
    *_, last = model.with_structured_output(Person, **how).stream(ANNA)
    assert last == Person(name="Anna", age=31)


def test_logprobs(model: ChatOpenAI) -> None:
    logprobs = model.bind(logprobs=True, top_logprobs=2).invoke(SUM).response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in logprobs).startswith("3 + 4 = 7.")
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)


def test_text_completions(demo: Server) -> None:
    model = OpenAI(base_url=f"{demo.url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=12, max_retries=0)
    whole = model.invoke("Once upon a time")
    assert whole == "".join(model.stream("Once upon a time"))
    several = model.generate(["Once upon a time", "7, 8, 9,"])
    assert several.generations[0][0].text == whole
    assert several.generations[1][0].text.startswith(" 10, 11")
    assert several.llm_output and several.llm_output["token_usage"]["completion_tokens"] == 24
    scored = model.bind(logprobs=1).invoke("Once upon a time")
    assert scored == whole


def test_responses(demo: Server) -> None:
    model = chat_model(demo, use_responses_api=True)
    assert model.invoke(SUM).text == "3 + 4 = 7."
    assert "".join(chunk.text for chunk in model.stream(SUM)) == "3 + 4 = 7."
    assert model.with_structured_output(Person).invoke(ANNA) == Person(name="Anna", age=31)


def test_what_is_refused_is_the_library_s_error(demo: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat_model(demo, top_p=3).invoke(SUM)
    assert caught.value.param == "top_p"


async def test_messages(demo: Server) -> None:
    """Anthropic's API: what it is asked for by chats above."""

    def made(name: str = MODEL) -> ChatAnthropic:
        options: dict[str, Any] = {"model": name, "api_key": "none", "max_retries": 0}
        return ChatAnthropic(base_url=demo.url, temperature=0, max_tokens=100, **options)

    model = made()
    whole = model.invoke(SUM)
    assert whole.text == "3 + 4 = 7." == "".join([chunk.text async for chunk in model.astream(SUM)])
    assert whole.usage_metadata and whole.usage_metadata["output_tokens"] > 0
    able = model.bind_tools([get_weather])
    for message in (able.invoke(WEATHER), reduce(add, able.stream(WEATHER))):
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
        assert "sunny" in able.invoke([HumanMessage(WEATHER[0]["content"]), message, get_weather.invoke(call)]).text
    for method in ("function_calling", "json_schema"):
        assert model.with_structured_output(Person, method=method).invoke(ANNA) == Person(name="Anna", age=31)
    with pytest.raises(anthropic.NotFoundError, match="'demo-9' does not exist"):
        made("demo-9").invoke(SUM)
