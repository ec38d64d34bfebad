"""What is asked of the built-in model, which answers it as expected."""

from __future__ import annotations

from typing import Any

MODEL = "demo"
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
ANNA: Any = [{"role": "user", "content": "Anna is 31 years old. Give me JSON with the keys name and age."}]
SUM: Any = [{"role": "user", "content": "What is 3 + 4?"}]
GET_WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
