"""Items of `input` in POST /v1/responses, made the messages of a chat. What we put out may come back as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from minisgl.errors import RequestError
from minisgl.server.content import RESPONSE_PARTS, text_of
from minisgl.server.protocol_tools import call_arguments
from minisgl.server.strict import Body, validate

Message = dict[str, Any]


class _Item(Body, ABC):
    """id, status: what they were called; without bearing on what comes next."""

    type: str = "message"
    id: str | None = None
    status: str | None = None

    @abstractmethod
    def add_to(self, messages: list[Message], where: str) -> None:
        """Raises: RequestError when it is not as templates need it."""


class _MessageItem(_Item):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]] | None = None

    def add_to(self, messages: list[Message], where: str) -> None:
        text = text_of(self.content, f"{where}.content", RESPONSE_PARTS)
        turn = _turn(messages) if self.role == "assistant" else None
        if turn is not None and ("tool_calls" in turn or not turn["content"]):
            turn["content"] += text
        else:
            messages.append({"role": self.role, "content": text})


class _ReasoningItem(_Item):
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None

    def add_to(self, messages: list[Message], where: str) -> None:
        if self.encrypted_content:
            param = f"{where}.encrypted_content"
            raise RequestError(f"{param} cannot be read by this server", param=param)
        name, kind = ("content", "reasoning_text") if self.content else ("summary", "summary_text")
        parts = self.content or self.summary
        if parts:
            text = text_of(parts, f"{where}.{name}", {kind: "text"})
            messages.append({"role": "assistant", "content": "", "reasoning_content": text})


class _CallItem(_Item):
    call_id: str
    name: str
    arguments: str

    def add_to(self, messages: list[Message], where: str) -> None:
        call_arguments(self.arguments, f"{where}.arguments")
        function = {"name": self.name, "arguments": self.arguments}
        turn = _turn(messages)
        if turn is None:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        turn.setdefault("tool_calls", []).append({"id": self.call_id, "type": "function", "function": function})


class _OutputItem(_Item):
    call_id: str
    output: str | list[dict[str, Any]]
    name: str | None = None

    def add_to(self, messages: list[Message], where: str) -> None:
        text = text_of(self.output, f"{where}.output", RESPONSE_PARTS)
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": text, "name": self.name})


_ITEMS: dict[str, type[_Item]] = {
    "message": _MessageItem,
    "reasoning": _ReasoningItem,
    "function_call": _CallItem,
    "function_call_output": _OutputItem,
}


def messages_of(items: list[dict[str, Any]]) -> list[Message]:
    """An assistant's reasoning, text and calls are one message of a chat, and several items here.

    Raises: RequestError naming the field at fault.
    """
    messages: list[Message] = []
    for index, item in enumerate(items):
        where, kind = f"input[{index}]", item.get("type", "message")
        if not isinstance(kind, str) or kind not in _ITEMS:
            raise RequestError(f"{where}.type must be one of {', '.join(_ITEMS)}, not {kind!r}", param=f"{where}.type")
        validate(_ITEMS[kind], item, where).add_to(messages, where)
    return messages


def _turn(messages: list[Message]) -> Message | None:
    """What the assistant has said last, unless someone else has spoken since."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None
