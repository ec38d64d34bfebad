"""Items of `input` in POST /v1/responses, made the messages of a chat. What we put out may come back as it is."""

from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as quoted
from typing import Any

from minisgl.errors import RequestError
from minisgl.server.content import kept_as_text, text_of, thought_of
from minisgl.server.fields import OBJECTS

Message = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")


def messages_of(items: list[dict[str, Any]]) -> list[Message]:
    """An assistant's reasoning, text and calls are one message of a chat, and several items here.

    Raises: RequestError naming the field at fault.
    """
    messages: list[Message] = []
    for index, item in enumerate(items):
        where, kind = f"input[{index}]", item.get("type", "message")
        if not isinstance(kind, str) or kind not in OBJECTS["item"].kinds:
            expected = ", ".join(_ITEMS)
            raise RequestError(f"{where}.type must be one of {expected}, not {quoted(kind)}", param=f"{where}.type")
        if kind in _ITEMS:  # the others came from tools that are not ours, and say nothing to this model
            _ITEMS[kind](item, messages, where)
    return messages


def _add_message(item: dict[str, Any], messages: list[Message], where: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        where += ".role"
        raise RequestError(f"{where} must be one of {', '.join(_ROLES)}, not {quoted(role)}", param=where)
    thoughts: list[str] | None = [] if role == "assistant" else None
    content = kept_as_text(item.get("content")) if role == "assistant" else item.get("content")
    texts = [text for text in [text_of(content, f"{where}.content", thoughts)] if text]
    turn = _turn(messages) if role == "assistant" else None
    if turn is not None and ("tool_calls" in turn or not turn["content"]):
        turn["content"] += texts
    else:
        messages.append({"role": role, "content": texts})


def _add_reasoning(item: dict[str, Any], messages: list[Message], where: str) -> None:  # noqa: ARG001
    thought = thought_of(item.get("content")) or thought_of(item.get("summary"))
    if thought:
        messages.append({"role": "assistant", "content": [], "reasoning_content": thought})


def _add_call(item: dict[str, Any], messages: list[Message], where: str) -> None:
    turn = _turn(messages)
    if turn is None:
        turn = {"role": "assistant", "content": []}
        messages.append(turn)
    call_id = item.get("call_id", item.get("id"))
    if not isinstance(item.get("name"), str):
        raise RequestError(f"{where}.name must be a string", param=f"{where}.name")
    arguments = item.get("arguments", item.get("input"))
    if item["type"] == "custom_tool_call":  # a function of one string, as `protocol_responses` tells the model
        arguments = {"input": item.get("input")}
    function = {"name": item["name"], "arguments": arguments}
    turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})


def _add_output(item: dict[str, Any], messages: list[Message], where: str) -> None:
    text = text_of(kept_as_text(item.get("output"), parts=False), f"{where}.output")
    messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text, "name": item.get("name")})


_ITEMS: dict[str, Callable[[dict[str, Any], list[Message], str], None]] = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "custom_tool_call": _add_call,
    "custom_tool_call_output": _add_output,
}


def _turn(messages: list[Message]) -> Message | None:
    """What the assistant has said last, unless someone else has spoken since."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None
