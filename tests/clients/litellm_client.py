"""Asks a server through LiteLLM: `python litellm_client.py URL MODEL` prints JSON.

A program of its own, because LiteLLM leaves event loops and connections open, and warnings are errors in tests.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import litellm

from tests.clients.prompts import ANNA, GET_WEATHER, SUM, WEATHER, Person

PROVIDERS = ("openai", "hosted_vllm")
TEXT_PROVIDERS = (*PROVIDERS, "text-completion-openai")


def text(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def summed(stream: Any) -> Any:
    return litellm.stream_chunk_builder(list(stream))


def chats(**asked: Any) -> dict[str, Any]:
    whole: Any = litellm.completion(**asked, messages=SUM)
    streamed = summed(litellm.completion(**asked, messages=SUM, stream=True, stream_options={"include_usage": True}))

    async def both() -> list[str]:
        answer = await litellm.acompletion(**asked, messages=SUM)
        stream: Any = await litellm.acompletion(**asked, messages=SUM, stream=True)
        return [text(answer), "".join([chunk.choices[0].delta.content or "" async for chunk in stream])]

    return {
        "texts": [text(whole), text(streamed), *asyncio.run(both())],
        "tokens": [answer.usage.completion_tokens for answer in (whole, streamed)],
        "finish_reason": whole.choices[0].finish_reason,
    }


def tools(**asked: Any) -> dict[str, Any]:
    """A call, whole and streamed. The message goes back as it came, with what LiteLLM has put beside it."""
    calls, finals = [], []
    for stream in (False, True):
        answer: Any = litellm.completion(**asked, messages=WEATHER, tools=[GET_WEATHER], stream=stream)
        choice = (summed(answer) if stream else answer).choices[0]
        (call,) = choice.message.tool_calls
        calls.append([choice.finish_reason, call.function.name, json.loads(call.function.arguments)])
        result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": '{"sky": "sunny"}'}
        messages = [*WEATHER, choice.message.model_dump() if stream else choice.message, result]
        finals.append(text(litellm.completion(**asked, messages=messages, tools=[GET_WEATHER])))
    return {"calls": calls, "finals": finals}


def forms(**asked: Any) -> dict[str, Any]:
    parsed = litellm.completion(**asked, messages=ANNA, response_format=Person)
    loose = litellm.completion(**asked, messages=ANNA, response_format={"type": "json_object"})
    forced: Any = litellm.completion(**asked, messages=SUM, tools=[GET_WEATHER], tool_choice="required")
    names = [call.function.name for call in forced.choices[0].message.tool_calls]
    return {"parsed": json.loads(text(parsed)), "loose": json.loads(text(loose)), "forced": names}


def fields(**asked: Any) -> dict[str, Any]:
    asked.update(temperature=1, n=2, seed=3, stop=["%"], max_tokens=8, presence_penalty=0.1, logit_bias={"5": 1})
    asked.update(user="me", top_p=0.9, logprobs=True, top_logprobs=2, top_k=20, extra_body={"ignore_eos": True})
    made: Any = litellm.completion(**asked, messages=SUM)
    return {"ends": [[choice.finish_reason, len(choice.logprobs.content)] for choice in made.choices]}


def errors(**asked: Any) -> dict[str, Any]:
    def error(**options: Any) -> list[str]:
        try:
            litellm.completion(**{"messages": SUM, **asked, **options})
        except Exception as caught:
            return [type(caught).__name__, str(caught)]
        return []

    long = [{"role": "user", "content": "many words " * 5000}]
    return {"bad": error(top_p=3), "missing": error(model=asked["model"] + "-9"), "long": error(messages=long)}


def responses(**asked: Any) -> dict[str, Any]:
    del asked["num_retries"]
    made: Any = litellm.responses(**asked, input=SUM)
    return {"text": made.output_text}


def texts(**asked: Any) -> dict[str, Any]:
    asked.update(prompt="Once upon a time")
    whole: Any = litellm.text_completion(**asked, max_tokens=8)
    stream: Any = litellm.text_completion(**asked, max_tokens=8, stream=True)
    echoed: Any = litellm.text_completion(**asked, max_tokens=1, logprobs=1, echo=True)
    return {
        "texts": [whole.choices[0].text, "".join(chunk.choices[0].text or "" for chunk in stream)],
        "echoed": echoed.choices[0].text,
        "logprobs": echoed.choices[0].logprobs.token_logprobs,
        "prompt_tokens": echoed.usage.prompt_tokens,
    }


def main() -> None:
    url, model = sys.argv[1:]
    parts: list[Callable[..., dict[str, Any]]] = [chats, tools, forms, fields, errors, responses]
    base: Any = {"api_base": url, "api_key": "none", "temperature": 0, "num_retries": 0}
    found = {
        provider: {part.__name__: part(model=f"{provider}/{model}", **base) for part in parts} for provider in PROVIDERS
    }
    found["texts"] = {provider: texts(model=f"{provider}/{model}", **base) for provider in TEXT_PROVIDERS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
