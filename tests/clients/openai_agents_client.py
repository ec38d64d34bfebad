"""Asks a server through OpenAI's Agents SDK: `python openai_agents_client.py URL MODEL` prints JSON.

A program of its own, because the SDK has one client for the whole process.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_default_openai_client

from tests.clients import prompts

Model = str | OpenAIChatCompletionsModel
WEATHER, ANNA, SUM = (asked[0]["content"] for asked in (prompts.WEATHER, prompts.ANNA, prompts.SUM))
GREEDY = ModelSettings(temperature=0)
get_weather = function_tool(prompts.get_weather)


async def both(agent: Agent, question: str) -> list[Any]:
    """The last output, whole and streamed."""
    whole = await Runner.run(agent, question)
    streamed = Runner.run_streamed(agent, question)
    deltas = [event.data.delta async for event in streamed.stream_events() if is_text(event)]
    if isinstance(streamed.final_output, str):
        assert "".join(deltas) == streamed.final_output
    return [whole.final_output, streamed.final_output]


def is_text(event: Any) -> bool:
    return event.type == "raw_response_event" and event.data.type == "response.output_text.delta"


async def tools(model: Model) -> dict[str, Any]:
    """A call, its result and the answer to it; then a question about them, with all that came back in the history."""
    agent = Agent(name="Assistant", instructions="Be brief.", model=model, model_settings=GREEDY, tools=[get_weather])
    first = await Runner.run(agent, WEATHER)
    second = await Runner.run(agent, [*first.to_input_list(), *prompts.SUM])
    streamed = Runner.run_streamed(agent, WEATHER)
    names = [event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
    return {
        "items": [item.type for item in first.new_items],
        "streamed": names,
        "outputs": [first.final_output, streamed.final_output],
        "later": second.final_output,
    }


async def handoff(model: Model) -> list[Any]:
    """Who answers in the end, and what the tool of the second agent said."""
    calls = ModelSettings(temperature=0, tool_choice="required")
    forecaster = Agent(
        name="Forecaster",
        model=model,
        model_settings=calls,
        tools=[get_weather],
        tool_use_behavior="stop_on_first_tool",
    )
    transfers = ModelSettings(temperature=0, tool_choice="transfer_to_forecaster")
    desk = Agent(name="Desk", model=model, handoffs=[forecaster], model_settings=transfers)
    made = await Runner.run(desk, WEATHER)
    return [made.last_agent.name, made.final_output]


async def persons(model: Model) -> list[Any]:
    """By an output type alone, and beside tools."""
    common: Any = {"name": "Reader", "model": model, "model_settings": GREEDY, "output_type": prompts.Person}
    agents = [Agent(**common, tools=able) for able in ([], [get_weather])]
    return [person.model_dump() for agent in agents for person in await both(agent, ANNA)]


async def error(agent: Agent, question: str) -> list[Any]:
    try:
        await Runner.run(agent, question)
    except openai.APIStatusError as caught:
        return [type(caught).__name__, caught.code, caught.param]
    return []


async def ask(model: Model, missing: Model) -> dict[str, Any]:
    agent = Agent(name="Assistant", model=model, model_settings=GREEDY)
    made = await Runner.run(agent, SUM)
    return {
        "texts": await both(agent, SUM),
        "usage": made.context_wrapper.usage.total_tokens,
        "tools": await tools(model),
        "handoff": await handoff(model),
        "persons": await persons(model),
        "missing": await error(Agent(name="Assistant", model=missing), SUM),
        "long": await error(agent, prompts.LONG[0]["content"]),
    }


async def main() -> None:
    url, model = sys.argv[1:]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        set_default_openai_client(client, use_for_tracing=False)
        chats = [OpenAIChatCompletionsModel(name, client) for name in (model, model + "-9")]
        found = {"responses": await ask(model, model + "-9"), "chats": await ask(*chats)}
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
