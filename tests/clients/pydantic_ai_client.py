"""Asks a server through Pydantic AI, by chats and by responses: `python pydantic_ai_client.py URL MODEL` prints JSON.

A program of its own, because its agents leave event loops and connections open, and warnings are errors in tests.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic_ai import Agent, ModelHTTPError, ModelRetry, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients import prompts
from tests.clients.prompts import Person, get_weather

Made = Callable[..., Agent[None, Any]]
WEATHER, ANNA, SUM, LONG = (asked[0]["content"] for asked in (prompts.WEATHER, prompts.ANNA, prompts.SUM, prompts.LONG))
OUTPUTS: dict[str, Any] = {
    "a type": Person,  # its default: a tool that the model has to call
    "ToolOutput": ToolOutput(Person, strict=True),
    "NativeOutput": NativeOutput(Person),
    "PromptedOutput": PromptedOutput(Person),
}


async def last(agent: Agent[None, Any], question: str) -> Any:
    """What a stream ends with."""
    async with agent.run_stream(question) as run:
        *_, output = [output async for output in run.stream_output(debounce_by=None)]
    return output


async def tools(agent: Made) -> dict[str, Any]:
    """A call, its result and the answer; then a question after the whole history."""
    able = agent(tools=[get_weather], instructions="Be brief.")
    first = await able.run(WEATHER)
    later = await able.run(SUM, message_history=first.all_messages())
    return {
        "outputs": [first.output, await last(able, WEATHER)],
        "parts": [part.part_kind for message in first.all_messages() for part in message.parts],
        "later": later.output,
    }


async def persons(agent: Made) -> dict[str, Any]:
    """By kind of output: alone, streamed, and beside a tool."""
    found = {}
    for name, output_type in OUTPUTS.items():
        alone, beside = agent(output_type=output_type), agent(output_type=output_type, tools=[get_weather])
        made = [(await alone.run(ANNA)).output, await last(alone, ANNA), (await beside.run(ANNA)).output]
        found[name] = [person.model_dump() for person in made]
    return found


async def complaints(agent: Made) -> int:
    """How many requests it takes when the first answer is complained about."""
    picky = agent(output_type=Person)

    @picky.output_validator
    def once(context: Any, person: Person) -> Person:
        if context.retry == 0:
            raise ModelRetry("look again")
        return person

    return (await picky.run(ANNA)).usage.requests


async def error(agent: Agent[None, Any], question: str) -> list[Any]:
    try:
        await agent.run(question)
    except ModelHTTPError as caught:
        body: Any = caught.body
        return [caught.status_code, body["code"], body["param"]]
    return []


async def main() -> None:
    url, model = sys.argv[1:]
    provider = OpenAIProvider(base_url=url, api_key="none")
    found: dict[str, Any] = {}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):

        def agent(name: str = model, kind: Any = kind, **options: Any) -> Agent[None, Any]:
            return Agent(kind(name, provider=provider), model_settings={"temperature": 0}, **options)

        made = await agent().run(SUM)
        found[kind.__name__] = {
            "texts": [made.output, await last(agent(), SUM), (await agent(system_prompt="Be brief.").run(SUM)).output],
            "usage": made.usage.input_tokens * made.usage.output_tokens,
            "tools": await tools(agent),
            "persons": await persons(agent),
            "complaints": await complaints(agent),
            "missing": await error(agent(model + "-9"), SUM),
            "long": await error(agent(), LONG),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
