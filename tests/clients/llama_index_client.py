"""Asks a server through LlamaIndex: `python llama_index_client.py URL MODEL` prints JSON.

A program of its own, because LlamaIndex needs another release of the `openai` library than the tests have.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients import prompts
from tests.clients.prompts import Person, get_weather

WEATHER, ANNA, SUM = (asked[0]["content"] for asked in (prompts.WEATHER, prompts.ANNA, prompts.SUM))
TOOL = FunctionTool.from_defaults(fn=get_weather, description=get_weather.__doc__)


async def texts(llm: OpenAILike) -> list[Any]:
    asked = [ChatMessage(role="user", content=SUM)]
    return [
        llm.complete(SUM).text,
        llm.chat(asked).message.content,
        "".join(chunk.delta or "" for chunk in llm.stream_chat(asked)),
        (await llm.achat(asked)).message.content,
        "".join([chunk.delta or "" async for chunk in await llm.astream_chat(asked)]),
    ]


def completions(llm: OpenAILike) -> list[str]:
    """Of text, which is what it asks for when it has not been told that the model chats."""
    story = "Once upon a time"
    return [llm.complete(story).text, "".join(chunk.delta or "" for chunk in llm.stream_complete(story))]


def calls(llm: OpenAILike) -> list[Any]:
    found = []
    for required in (False, True):
        answer = llm.chat_with_tools([TOOL], user_msg=WEATHER, tool_required=required)
        (call,) = llm.get_tool_calls_from_response(answer)
        found.append([call.tool_name, call.tool_kwargs])
    return found


async def agents(llm: OpenAILike) -> dict[str, Any]:
    """It streams: calls, their results and the answer. The second question has all of it in the history."""
    agent = FunctionAgent(tools=[TOOL], llm=llm, system_prompt="Be brief.")
    reader = FunctionAgent(tools=[TOOL], llm=llm, output_cls=Person)
    first = await agent.run(WEATHER)
    history = [ChatMessage(role="user", content=WEATHER), first.response]
    return {
        "called": [call.tool_name for call in first.tool_calls],
        "outputs": [str(first), str(await agent.run(SUM, chat_history=history))],
        "person": (await reader.run(ANNA)).structured_response,
    }


def persons(llm: OpenAILike, by_schema: OpenAILike) -> list[Any]:
    """By a call of a function that is not one, streamed, and by `response_format`."""
    template = PromptTemplate(ANNA)
    *_, streamed = llm.stream_structured_predict(Person, template)
    made = [llm.structured_predict(Person, template), streamed, llm.as_structured_llm(Person).complete(ANNA).raw]
    return [person.model_dump() for person in [*made, by_schema.structured_predict(Person, template)]]


def error(llm: OpenAILike, question: str) -> list[Any]:
    try:
        llm.complete(question)
    except openai.APIStatusError as caught:
        return [type(caught).__name__, caught.code]
    return []


def main() -> None:
    url, model = sys.argv[1:]
    base: Any = {"model": model, "api_base": url, "api_key": "none", "max_retries": 0, "temperature": 0}
    llm = OpenAILike(**base, is_chat_model=True, is_function_calling_model=True)
    found = {
        "openai": openai.__version__,
        "texts": asyncio.run(texts(llm)),
        "completions": completions(OpenAILike(**base, max_tokens=12)),
        "calls": calls(llm),
        "agents": asyncio.run(agents(llm)),
        "persons": persons(llm, OpenAILike(**base, is_chat_model=True, should_use_structured_outputs=True)),
        "missing": error(OpenAILike(**{**base, "model": model + "-9"}, is_chat_model=True), SUM),
        "long": error(llm, prompts.LONG[0]["content"]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
