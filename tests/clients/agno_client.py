"""Asks a server through Agno, by chats and by responses: `python agno_client.py URL MODEL` prints JSON.

A program of its own, because Agno keeps one HTTP client for the whole process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from agno.agent import Agent
from agno.models.openai import OpenAILike, OpenAIResponses
from agno.models.vllm import VLLM

from tests.clients import prompts
from tests.clients.prompts import Person, get_weather

WEATHER, ANNA, SUM, LONG = (asked[0]["content"] for asked in (prompts.WEATHER, prompts.ANNA, prompts.SUM, prompts.LONG))


def both(agent: Agent, question: str) -> list[Any]:
    """What it says, whole and streamed."""
    return [agent.run(question).content, "".join(event.content or "" for event in agent.run(question, stream=True))]


def ask(make: Callable[..., Agent]) -> dict[str, Any]:
    able = make(tools=[get_weather], instructions="Be brief.")
    readers = [make(output_schema=Person), make(output_schema=Person, use_json_mode=True)]
    readers.append(make(output_schema=Person, tools=[get_weather]))
    called = able.run(WEATHER)
    failed = [make(name="missing").run(SUM), make().run(LONG)]
    return {
        "texts": both(make(), SUM),
        "usage": called.metrics.output_tokens,
        "calls": [[call.tool_name, call.tool_args, call.result] for call in called.tools],
        "outputs": [called.content, both(able, WEATHER)[1]],
        "persons": [reader.run(ANNA).content.model_dump() for reader in readers],
        "errors": [[run.status.value, run.content] for run in failed],
    }


def main() -> None:
    url, model = sys.argv[1:]
    found = {}
    for kind in (OpenAILike, VLLM, OpenAIResponses):

        def make(name: str = model, kind: Any = kind, **options: Any) -> Agent:
            made = kind(id=name, base_url=url, api_key="none", max_retries=0, temperature=0)
            return Agent(model=made, telemetry=False, **options)

        found[kind.__name__] = ask(make)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
