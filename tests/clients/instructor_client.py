"""Asks a server through Instructor in each of its modes: `python instructor_client.py URL MODEL` prints JSON.

A program of its own, because Instructor needs another release of the `openai` library than the tests have.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from typing import Any

import instructor
import openai
from instructor.core.exceptions import InstructorRetryException
from pydantic import field_validator

from tests.clients.prompts import ANNA, Person

MODES = ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA")


class Shouted(Person):
    """What the model does not give."""

    @field_validator("name")
    @classmethod
    def loud(cls, name: str) -> str:
        if not name.isupper():
            raise ValueError("the name must be in capital letters")
        return name


def answers(client: instructor.Instructor, asked: dict[str, Any]) -> dict[str, Any]:
    """Whole, with the answer that it was made of, and as it comes."""
    create = client.chat.completions
    person, completion = create.create_with_completion(**asked, response_model=Person)
    return {
        "whole": person.model_dump(),
        "partial": [part.model_dump() for part in create.create_partial(**asked, response_model=Person)],
        "tool_calls": len(completion.choices[0].message.tool_calls or []),
        "total_tokens": completion.usage.total_tokens,
    }


async def asynchronous(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as raw:
        client = instructor.from_openai(raw, mode=instructor.Mode.TOOLS)
        person = await client.chat.completions.create(**asked, response_model=Person)
    return person.model_dump()


def asked_again(client: instructor.Instructor, asked: dict[str, Any]) -> int:
    """How often the server is asked for what it does not give: Instructor answers the call with its complaint."""
    try:
        client.chat.completions.create(**{**asked, "max_retries": 1, "max_tokens": 100}, response_model=Shouted)
    except InstructorRetryException as error:
        return error.n_attempts
    return 0


def main() -> None:
    url, model = sys.argv[1:]
    warnings.simplefilter("ignore")  # some modes are called old
    asked = {"model": model, "messages": ANNA, "temperature": 0, "max_retries": 0}
    found: dict[str, Any] = {"openai": openai.__version__}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as raw:
        for mode in MODES:
            found[mode] = answers(instructor.from_openai(raw, mode=instructor.Mode[mode]), asked)
        found["attempts"] = asked_again(instructor.from_openai(raw, mode=instructor.Mode.TOOLS), asked)
    found["async"] = asyncio.run(asynchronous(url, asked))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
