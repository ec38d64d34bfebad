"""Asks a server through AutoGen: `python autogen_client.py URL MODEL` prints JSON.

A program of its own, because AutoGen needs an older protobuf than others do.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from typing import Any

import openai
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelInfo
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

from tests.clients import prompts
from tests.clients.prompts import Person, get_weather

WEATHER, ANNA, SUM, LONG = (asked[0]["content"] for asked in (prompts.WEATHER, prompts.ANNA, prompts.SUM, prompts.LONG))
ABILITIES = ModelInfo(
    vision=False, function_calling=True, json_output=True, structured_output=True, family="unknown"
)  # which it has to be told of a model that it does not know
TOOL = FunctionTool(get_weather, "Get the weather in a city.", strict=True)


async def both(model: OpenAIChatCompletionClient, question: str, **options: Any) -> list[Any]:
    """The last message, whole and streamed."""
    whole = await AssistantAgent("assistant", model, **options).run(task=question)
    streaming = AssistantAgent("assistant", model, model_client_stream=True, **options)
    *_, streamed = [event async for event in streaming.run_stream(task=question)]
    return [result.messages[-1] for result in (whole, streamed)]  # type: ignore[union-attr]


async def team(model: OpenAIChatCompletionClient) -> list[str]:
    """Who said something: each sees what the others said under their names."""
    agents = [AssistantAgent(name, model, system_message="Be brief.") for name in ("one", "two")]
    made = await RoundRobinGroupChat([*agents], termination_condition=MaxMessageTermination(4)).run(task=SUM)
    return [message.source for message in made.messages]


async def error(model: OpenAIChatCompletionClient, question: str) -> list[Any]:
    try:
        await AssistantAgent("assistant", model).run(task=question)
    except openai.APIStatusError as caught:
        return [type(caught).__name__, caught.code]
    return []


async def main() -> None:
    url, model = sys.argv[1:]
    warnings.simplefilter("ignore")
    base: Any = {"base_url": url, "api_key": "none", "model_info": ABILITIES, "max_retries": 0, "temperature": 0}
    client, missing = (OpenAIChatCompletionClient(model=name, **base) for name in (model, model + "-9"))
    texts = await both(client, SUM)
    tools = await both(client, WEATHER, tools=[TOOL], reflect_on_tool_use=True)
    typed: Any = {"output_content_type": Person}
    persons = [*await both(client, ANNA, **typed), *await both(client, ANNA, **typed, tools=[TOOL])]
    found = {
        "texts": [message.content for message in texts],
        "usage": texts[0].models_usage.completion_tokens,
        "tools": [message.content for message in tools],
        "persons": [message.content.model_dump() for message in persons],
        "team": await team(client),
        "missing": await error(missing, SUM),
        "long": await error(client, LONG),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
