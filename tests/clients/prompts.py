"""What is asked of the built-in model, which answers it as expected."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

MODEL = "demo"
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
ANNA: Any = [{"role": "user", "content": "Anna is 31 years old. Give me JSON with the keys name and age."}]
SUM: Any = [{"role": "user", "content": "What is 3 + 4?"}]
LONG: Any = [{"role": "user", "content": "Hello! " * 2000}]  # more than the context of this model
GET_WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"It is sunny in {city}."
