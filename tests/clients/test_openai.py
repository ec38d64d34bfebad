"""The `openai` library in the ways in which its documentation has people use it, with the built-in model.

What single fields do is in `tests/e2e`; here is what the library makes of the answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel, Field

from tests.clients.prompts import ANNA, GET_WEATHER, MODEL, SUM, WEATHER, Person
from tests.e2e.conftest import Server

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
ENDLESS: dict[str, Any] = {"model": MODEL, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
# What pydantic says of the library's own generic classes when they are made JSON again.
REPEATED = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


class get_weather(BaseModel):
    """Get the weather in a city."""

    city: str


@pytest.fixture
def client(demo: Server) -> Iterator[openai.OpenAI]:
    with demo.client() as made:
        yield made


def asynchronous(demo: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60)


async def test_the_async_client_gets_what_the_other_gets(demo: Server, client: openai.OpenAI) -> None:
    """All at once, and each of them whole and streamed."""
    chat = client.chat.completions.create(**GREEDY, messages=SUM).choices[0].message.content
    text = client.completions.create(**GREEDY, prompt="Once upon a time", max_tokens=12).choices[0].text
    async with asynchronous(demo) as made:

        async def chats() -> str:
            stream = await made.chat.completions.create(**GREEDY, messages=SUM, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def texts() -> str:
            asked: Any = {**GREEDY, "prompt": "Once upon a time", "max_tokens": 12}
            stream = await made.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def responses() -> str:
            async with made.responses.stream(**GREEDY, input=SUM) as stream:
                return (await stream.get_final_response()).output_text

        parsed = made.chat.completions.parse(**GREEDY, messages=ANNA, response_format=Person)
        written = made.responses.parse(**GREEDY, input=ANNA, text_format=Person)
        whole = made.chat.completions.create(**GREEDY, messages=SUM)
        answers = await asyncio.gather(chats(), texts(), responses(), parsed, written, whole)
    assert chat == "3 + 4 = 7." == answers[0] == answers[2] == answers[5].choices[0].message.content
    assert answers[1] == text
    assert answers[3].choices[0].message.parsed == answers[4].output_parsed == Person(name="Anna", age=31)


class Step(BaseModel):
    kind: Literal["add", "carry"]
    digits: list[Literal[0, 1, 2]] = Field(max_length=3)
    note: Literal["!"] | None


class Solution(BaseModel):
    """Nested, with lists, a choice and what may be null: as the library turns it into a strict schema."""

    steps: list[Step] = Field(max_length=3)
    answer: Literal[7]


def test_parsed_chats(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0.6, "seed": 1, "n": 2, "max_tokens": 400}
    made = client.beta.chat.completions.parse(**asked, messages=SUM, response_format=Solution)
    for choice in made.choices:
        assert choice.message.parsed is not None
        assert choice.message.parsed.answer == 7


@REPEATED
def test_a_stream_with_a_form_is_parsed_as_it_comes(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**GREEDY, messages=ANNA, response_format=Person, logprobs=True) as stream:
        events = list(stream)
        completion = stream.get_final_completion()
    ages = [event.parsed.get("age") for event in events if event.type == "content.delta" and event.parsed]
    assert ages[-1] == 31 and None in ages  # by and by
    (done,) = [event for event in events if event.type == "content.done"]
    assert done.parsed == completion.choices[0].message.parsed == Person(name="Anna", age=31)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert "".join(entry.token for entry in logprobs.content or []).startswith(done.content)


def test_streamed_choices_add_up_to_the_whole_ones(client: openai.OpenAI) -> None:
    """By the library's own addition: n, seed, stop, log-probabilities and usage."""
    asked: Any = {"model": MODEL, "messages": SUM, "n": 3, "seed": 7, "temperature": 1.2, "max_tokens": 12}
    asked.update(logprobs=True, top_logprobs=2, stop=["\n", "7"])
    whole = client.chat.completions.create(**asked)
    state: Any = ChatCompletionStreamState()
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        state.handle_chunk(chunk)
    summed = state.get_final_completion()
    assert summed.usage.completion_tokens == whole.usage.completion_tokens
    for ours, theirs in zip(sorted(summed.choices, key=lambda c: c.index), whole.choices, strict=True):
        assert (ours.message.content or "") == (theirs.message.content or "")
        assert ours.finish_reason == theirs.finish_reason
        for one, other in zip(ours.logprobs.content, theirs.logprobs.content, strict=True):
            assert (one.token, one.bytes) == (other.token, other.bytes)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)  # another batch, other roundings
            assert len(one.top_logprobs) == 2
    assert any(choice.finish_reason == "stop" for choice in whole.choices)


@REPEATED
@pytest.mark.parametrize("how", ["whole", "parsed", "streamed"])
def test_tools(client: openai.OpenAI, how: str) -> None:
    """A call, and the sentence after its result; the message goes back as the library gave it."""
    tools: Any = [GET_WEATHER if how == "whole" else openai.pydantic_function_tool(get_weather)]
    asked: dict[str, Any] = {**GREEDY, "messages": WEATHER, "tools": tools}
    made: Any
    if how == "streamed":
        with client.chat.completions.stream(**asked) as stream:
            made = stream.get_final_completion()
    else:
        made = (client.chat.completions.parse if how == "parsed" else client.chat.completions.create)(**asked)
    choice = made.choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "get_weather",
        {"city": "Paris"},
    )
    assert how == "whole" or call.function.parsed_arguments == get_weather(city="Paris")
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny"}'}
    for message in (choice.message, choice.message.model_dump()):
        final = client.chat.completions.create(**{**asked, "messages": [*WEATHER, message, result]})
        assert "sunny" in final.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_call_comes_though_nobody_asked(client: openai.OpenAI, stream: bool) -> None:
    """One, if the function is named, however often the model would call it."""
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        asked: Any = {**GREEDY, "messages": SUM, "tools": [GET_WEATHER], "tool_choice": choice, "max_tokens": 100}
        if stream:
            with client.chat.completions.stream(**asked) as events:
                made: Any = events.get_final_completion()
        else:
            made = client.chat.completions.create(**asked)
        assert made.choices[0].finish_reason == "tool_calls"
        calls = made.choices[0].message.tool_calls
        assert all(isinstance(json.loads(call.function.arguments)["city"], str) for call in calls)
        assert choice == "required" or len(calls) == 1


@REPEATED
def test_parsed_messages_are_taken_back(client: openai.OpenAI) -> None:
    message = client.chat.completions.parse(**GREEDY, messages=ANNA, response_format=Person).choices[0].message
    for sent in (message, message.model_dump()):
        again = client.chat.completions.create(**GREEDY, messages=[*ANNA, sent, *SUM])
        assert again.choices[0].message.content


def test_raw_answers_have_the_request_s_id(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **GREEDY, messages=SUM, extra_headers={"x-request-id": "of-this-test"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == raw.parse()._request_id == "of-this-test"
    assert int(raw.headers["content-length"]) == len(raw.content)
    with client.completions.with_streaming_response.create(model=MODEL, prompt="a", max_tokens=3, stream=True) as lines:
        assert lines.headers["x-request-id"]
        assert list(lines.iter_lines())[-2] == "data: [DONE]"


def test_errors_are_of_the_right_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**GREEDY, "top_p": 3}, messages=SUM)
    assert (bad.value.param, bad.value.type, bad.value.status_code) == ("top_p", "invalid_request_error", 400)
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="start the server with --task embed"):
        client.embeddings.create(model=MODEL, input="a")
    streams: list[tuple[Any, str]] = [(client.chat.completions, "messages"), (client.responses, "input")]
    for made, field in streams:
        with pytest.raises(openai.BadRequestError):  # before the first event
            made.create(model=MODEL, stream=True, **{field: 3})


def wait_idle(http: httpx.Client) -> None:
    """Until nothing runs; what was abandoned would run for a minute."""
    deadline = time.monotonic() + 20
    while (load := http.get("/server_info").json()["load"]) and any(load.values()):
        assert time.monotonic() < deadline, load
        time.sleep(0.05)


def test_a_timeout_ends_the_request(client: openai.OpenAI, http: httpx.Client) -> None:
    # The server knows how long the client waits: it is either of them that gives up first.
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError), match=r"timed out|no answer within"):
        client.with_options(timeout=0.3).completions.create(**ENDLESS, prompt="Once")
    wait_idle(http)


async def test_cancelled_tasks_and_closed_streams_end_their_requests(demo: Server, http: httpx.Client) -> None:
    async with asynchronous(demo) as made:
        task = asyncio.create_task(made.chat.completions.create(**ENDLESS, messages=SUM))
        async with await made.completions.create(**ENDLESS, prompt="Once", stream=True) as stream:
            async for _ in stream:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_idle, http)
