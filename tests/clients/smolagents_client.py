"""Asks a server through smolagents: `python smolagents_client.py URL MODEL` prints JSON.

A program of its own, because its agents run code.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from smolagents import ChatMessage, CodeAgent, OpenAIModel, ToolCallingAgent, tool
from smolagents.agents import EMPTY_PROMPT_TEMPLATES, ActionStep
from smolagents.models import agglomerate_stream_deltas
from smolagents.monitoring import LogLevel
from smolagents.utils import AgentGenerationError

from tests.clients import prompts

QUESTION = prompts.WEATHER[0]["content"]
BRIEF: Any = {**EMPTY_PROMPT_TEMPLATES, "system_prompt": "Be brief."}  # its own are long: ours is a small model


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: The name of the city.
    """
    return prompts.get_weather(city)


def texts(model: OpenAIModel) -> list[Any]:
    asked = [ChatMessage(role="user", content=[{"type": "text", "text": prompts.SUM[0]["content"]}])]  # type: ignore[arg-type]
    return [model.generate(asked).content, agglomerate_stream_deltas(list(model.generate_stream(asked))).content]


def calling(model: OpenAIModel, **options: Any) -> dict[str, Any]:
    """What its agent of calls did, which demands one in each step."""
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=2, verbosity_level=LogLevel.OFF, **options)
    agent.run(QUESTION)
    answers = [step.model_output_message for step in agent.memory.steps if isinstance(step, ActionStep)]
    calls = [call.function for answer in answers if answer for call in answer.tool_calls or []]
    return {
        "calls": [[call.name, sorted(call.arguments)] for call in calls],
        "tokens": agent.monitor.get_total_token_counts().total_tokens,
    }


def coding(model: OpenAIModel) -> dict[str, Any]:
    """What its agent of code asks for: an object with a thought and code."""
    options: Any = {"max_steps": 1, "verbosity_level": LogLevel.OFF, "prompt_templates": BRIEF}
    agent = CodeAgent(tools=[], model=model, use_structured_outputs_internally=True, **options)
    agent.run(QUESTION)
    (step,) = [step for step in agent.memory.steps if isinstance(step, ActionStep) and step.step_number == 1]
    assert step.model_output_message is not None
    return {name: type(value).__name__ for name, value in json.loads(str(step.model_output_message.content)).items()}


def error(model: OpenAIModel) -> str:
    """Of the prompt that its agent of code has by default, which is longer than our context."""
    try:
        CodeAgent(tools=[get_weather], model=model, verbosity_level=LogLevel.OFF).run(QUESTION)
    except AgentGenerationError as caught:
        return str(caught)
    return ""


def main() -> None:
    url, model = sys.argv[1:]
    made = OpenAIModel(model, api_base=url, api_key="none", client_kwargs={"max_retries": 0}, temperature=0)
    with contextlib.redirect_stdout(sys.stderr):  # what the agents' code prints
        found = {
            "texts": texts(made),
            "calling": calling(made),
            "streamed": calling(made, stream_outputs=True),
            "coding": coding(made),
            "long": error(made),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
