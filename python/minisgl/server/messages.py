"""Messages of a chat, as templates take them. What a model has said is never refused, however it comes back."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import repr as quoted
from typing import Annotated, Any

import yaml
from pydantic import WithJsonSchema
from pydantic_core import from_json

from minisgl.errors import RequestError
from minisgl.message.codec import carried
from minisgl.server.content import kept_as_text, text_of, thought_of

MAX_MESSAGES = 16384
REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
_OTHER_ROLES = {"developer": "system", "function": "tool"}  # what templates know them as
_SCHEMA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ROLES: list[str] = _SCHEMA["properties"]["role"]["enum"]
Message = Annotated[dict[str, Any], WithJsonSchema(_SCHEMA)]


def chat_messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with its text as one string, and what goes with the role. Raises: RequestError naming the field at fault."""
    if len(given) > MAX_MESSAGES:
        raise RequestError(f"messages must hold at most {MAX_MESSAGES} messages, not {len(given)}", param="messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    waiting: dict[str, None] = {}  # calls that have no result yet
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            call["id"] = call["id"] or f"call_{index}_{number}"
            waiting[call["id"]] = None
        if message["role"] == "tool":
            message["tool_call_id"] = message["tool_call_id"] or next(iter(waiting), f"call_{index}")
            waiting.pop(message["tool_call_id"], None)
    return messages


def _message(given: dict[str, Any], where: str) -> dict[str, Any]:
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {quoted(role)}", param=f"{where}.role")
    template_role = _OTHER_ROLES.get(role, role)
    content = given.get("content")
    thoughts: list[str] | None = [] if role == "assistant" else None
    if template_role in ("assistant", "tool"):  # it may be nothing, beside calls and of functions that give nothing
        said = _text(given.get("refusal")) if content is None else content
        content = kept_as_text(said, parts=template_role == "assistant")
    message = {"role": template_role, "content": text_of(content, f"{where}.content", thoughts)}
    name = given.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise RequestError(f"{where}.name must be a string", param=f"{where}.name")
        message["name"] = name
    if template_role == "tool":
        message["tool_call_id"] = _text(given.get("tool_call_id"))
    if thoughts is not None:
        message |= _said(given, thoughts, where)
    return message


def _said(given: dict[str, Any], thoughts: list[str], where: str) -> dict[str, Any]:
    """Reasoning and calls of an assistant's message."""
    fields: dict[str, Any] = {}
    calls = given.get("tool_calls") or ([given["function_call"]] if given.get("function_call") else [])
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list", param=f"{where}.tool_calls")
    if calls:
        fields["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    reasoning = next(filter(None, (thought_of(given.get(name)) for name in REASONING)), "".join(thoughts))
    if reasoning or given.get("reasoning_content") == "":
        fields["reasoning_content"] = reasoning
    return fields


def _call(given: Any, where: str) -> dict[str, Any]:
    """A call: of a function, of a custom tool, or flat as the older API and some libraries have it."""
    function = given.get("function", given.get("custom", given)) if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise RequestError(f"{where}.function.name must be a string", param=f"{where}.function.name")
    arguments = next((function[key] for key in ("arguments", "input", "args") if key in function), None)
    return {"id": _text(given.get("id")), "type": "function", "function": {"name": name, "arguments": sent(arguments)}}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def sent(arguments: Any) -> dict[str, Any] | str:
    """A call's arguments as messages between processes carry them: an object if that can be, otherwise their text."""
    value = arguments
    for _ in range(2):  # some clients write the text of JSON as JSON
        if isinstance(value, str):
            try:
                value = from_json(value) if value.strip() else {}
            except ValueError:
                break
    if isinstance(value, dict) and carried(value):
        return value
    return {} if value is None else arguments if isinstance(arguments, str) else json.dumps(arguments)
