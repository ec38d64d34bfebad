"""Asks a server through Haystack, by chats and by responses: `python haystack_client.py URL MODEL` prints JSON.

A program of its own, because Haystack leaves connections open, and warnings are errors in tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import openai
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool

from tests.clients import prompts
from tests.clients.prompts import Person, get_weather

Generator = OpenAIChatGenerator | OpenAIResponsesChatGenerator
FUNCTION = prompts.GET_WEATHER["function"]
TOOL = Tool(FUNCTION["name"], FUNCTION["description"], FUNCTION["parameters"], function=get_weather)
WEATHER, ANNA, SUM, LONG = (
    [ChatMessage.from_user(asked[0]["content"])] for asked in (prompts.WEATHER, prompts.ANNA, prompts.SUM, prompts.LONG)
)


def reply(generator: Generator, asked: list[ChatMessage]) -> ChatMessage:
    (made,) = generator.run(asked)["replies"]
    return made


def texts(make: Callable[..., Generator]) -> dict[str, Any]:
    chunks: list[StreamingChunk] = []
    whole, streamed = reply(make(), SUM), reply(make(streaming_callback=chunks.append), SUM)
    usage = whole.meta["usage"]
    return {
        "texts": [whole.text, streamed.text, "".join(chunk.content for chunk in chunks)],
        "usage": usage.get("completion_tokens", usage.get("output_tokens")),
    }


def tools(make: Callable[..., Generator]) -> dict[str, Any]:
    """Calls as they come; and an agent, which sends them back with their results."""
    made = [reply(make(tools=[TOOL], tools_strict=strict), WEATHER).tool_call for strict in (False, True)]
    agents = [Agent(chat_generator=make(), tools=[TOOL], streaming_callback=how) for how in (None, lambda chunk: None)]
    answers = [agent.run(messages=WEATHER)["messages"] for agent in agents]
    return {
        "calls": [[call.tool_name, call.arguments] for call in made if call],
        "roles": [[message.role.value for message in messages] for messages in answers],
        "outputs": [messages[-1].text for messages in answers],
    }


def persons(make: Callable[..., Generator], field: str) -> list[Any]:
    """Alone, and beside a tool."""
    options: Any = {"generation_kwargs": {"temperature": 0, field: Person}}
    made = [make(**options), make(**options, tools=[TOOL], tools_strict=True)]
    return [json.loads(reply(generator, ANNA).text or "") for generator in made]


def error(generator: Generator, asked: list[ChatMessage]) -> list[Any]:
    try:
        reply(generator, asked)
    except openai.APIStatusError as caught:
        return [type(caught).__name__, caught.code]
    return []


def main() -> None:
    url, model = sys.argv[1:]
    os.environ["OPENAI_API_KEY"] = "none"
    found: dict[str, Any] = {}
    for kind, field in ((OpenAIChatGenerator, "response_format"), (OpenAIResponsesChatGenerator, "text_format")):

        def make(name: str = model, kind: Any = kind, **options: Any) -> Generator:
            common: Any = {"api_base_url": url, "max_retries": 0, "generation_kwargs": {"temperature": 0}}
            return kind(model=name, **{**common, **options})  # type: ignore[no-any-return]

        found[kind.__name__] = {
            **texts(make),
            "tools": tools(make),
            "persons": persons(make, field),
            "missing": error(make(model + "-9"), SUM),
            "long": error(make(), LONG),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
