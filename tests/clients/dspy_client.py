"""Asks a server through DSPy: `python dspy_client.py URL MODEL` prints JSON.

A program of its own, because it makes its cache when it is imported, and warnings are errors in tests.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from typing import Any, Literal

import dspy
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider
from pydantic import BaseModel

from tests.clients import prompts
from tests.clients.prompts import get_weather

SUM = prompts.SUM[0]["content"]


class Guest(BaseModel):
    name: Literal["Anna", "Ben"]
    grown: bool


class Find(dspy.Signature):
    """Who comes? Types that have an end, since our model may find none in a text."""

    text: str = dspy.InputField()
    sure: bool = dspy.OutputField()
    guest: Guest = dspy.OutputField()


class Call(dspy.Signature):
    """Call a tool."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


def called(adapter: dspy.Adapter) -> list[Any]:
    with dspy.context(adapter=adapter):
        asked: Any = {"question": "The weather?", "tools": [dspy.Tool(get_weather)]}
        call, *_ = dspy.Predict(Call)(**asked, config={"tool_choice": "required"}).outputs.tool_calls
    return [call.name, sorted(call.args)]


async def streamed() -> dspy.Prediction:
    """The end of a stream, whose first parts are the server's."""
    *parts, prediction = [part async for part in dspy.streamify(dspy.Predict(Find))(text="Anna comes.")]
    assert parts
    return prediction


def error(lm: dspy.LM, question: str) -> list[str]:
    try:
        lm(question)
    except dspy.LMError as caught:
        return [type(caught).__name__, str(caught)]
    return []


def ask(engine: str, url: str, model: str) -> dict[str, Any]:
    """Programs whose answers have types: what the adapters make of them, and what they ask the server for."""
    options: Any = {"num_retries": 0, "cache": False, "temperature": 0, "engine": engine}
    # As its documentation has people call a server of their own; and as a provider of whose abilities it has been told.
    plain = dspy.LM(f"openai/{model}", api_base=url, api_key="none", **options)
    able = dspy.LM(f"minisgl/{model}", **options)
    with dspy.context(lm=able):
        calls = [called(dspy.ChatAdapter(use_native_function_calling=True)), called(dspy.JSONAdapter())]
        made = [dspy.Predict(Find)(text="Anna comes.")]
        with dspy.context(adapter=dspy.JSONAdapter()):
            made += [dspy.Predict(Find)(text="Anna comes."), asyncio.run(streamed())]
    return {
        "texts": [plain(SUM), able(SUM)],
        "usage": able.history[-1]["usage"]["completion_tokens"],
        "types": [[type(answer.sure).__name__, type(answer.guest).__name__] for answer in made],
        "calls": calls,
        "missing": error(dspy.LM(f"minisgl/{model}-9", **options), SUM),
        "long": error(able, prompts.LONG[0]["content"]),
    }


def main() -> None:
    url, model = sys.argv[1:]
    warnings.simplefilter("ignore")
    access = AccessPolicy(provider="minisgl", env_keys=(), base_url=url)
    definition = ProviderDefinition.chat(access, compat=OpenAIChatCompat(), placeholder_key="none")
    register_provider(definition, supports=ModelSupport(function_calling=True, response_schema=True))
    print(json.dumps({engine: ask(engine, url, model) for engine in ("lm15", "litellm")}))


if __name__ == "__main__":
    main()
