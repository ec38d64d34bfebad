"""POST /v1/messages, Anthropic's API: what clients may send, turned into the chat that it means."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from minisgl.core import MAX_COUNT
from minisgl.errors import RequestError
from minisgl.server.fields import fields_of
from minisgl.server.protocol import GenerationRequest, chat_request
from minisgl.server.protocol_sampling import SamplingFields
from minisgl.server.protocol_tools import MAX_TOOLS
from minisgl.server.strict import Body, Fields, Reading, load_object, optional, shown, validate

# What Anthropic's own client puts before its system prompt (`x-anthropic-billing-header: …`), for Anthropic's servers.
# It changes with each request: with it, no prompt would find its beginning in the prefix cache.
_VOLATILE = re.compile(r"(?:x-anthropic-[\w-]+:[^\n]*\n*)+")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_MEDIA = ("image", "document", "container_upload")
# How `chat_request` and the tokenizer name what they refuse.
_PARAMS = {"stop": "stop_sequences", "response_format": "output_config.format", "reasoning_effort": "output_config"}

Message = dict[str, Any]
Blocks = str | list[dict[str, Any]]


class Turn(Body):
    """A message: text, results of tools, or what the assistant has said. No images."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolUseChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Body):
    effort: str | None = optional("As `reasoning_effort` of a chat.")
    format: dict[str, Any] | None = optional("A JSON schema that the text has to match.")


class Thinking(Body):
    """Whether the model thinks first, if its chat template lets us choose. How long cannot be chosen."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class MessagesBody(Body, SamplingFields):
    """POST /v1/messages, and /v1/messages/count_tokens."""

    model: str | None = optional("The id that /v1/models shows.")
    messages: list[Turn] = Field(json_schema_extra={"minItems": 1})
    system: Blocks | None = optional("The system prompt.")
    max_tokens: int | None = optional("Most tokens of the output.", ge=1, le=MAX_COUNT)
    stop_sequences: list[str] | None = optional("What ends the output; it is cut off.")
    stream: bool | None = optional("Answer with server-sent events.")
    tools: list[dict[str, Any]] | None = optional("Those that the client describes.", maxItems=MAX_TOOLS)
    tool_choice: ToolUseChoice | None = optional("Whether the model has to call one.")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = optional("`output_config.format`, by its older name.")
    chat_template_kwargs: dict[str, Any] | None = optional("For the chat template.")


_OF_CALLS = ("id", "name", "input", "tool_use_id", "content", "is_error", "tool_name")
_OF_TEXTS = ("type", "text", "thinking", "data", "signature", "source", "title", "context")
_BLOCK = Fields((*_OF_CALLS, *_OF_TEXTS), ignored=("cache_control", "citations"))
_BLOCKS = replace(_BLOCK, nested={"content": _BLOCK})
_TOOL = Fields(("type", "name", "description", "input_schema", "strict"), ignored=("cache_control",))
MESSAGES = fields_of(
    MessagesBody,
    nested={
        "messages": Fields(("role", "content"), nested={"content": _BLOCKS}),
        "system": _BLOCK,
        "tools": _TOOL,
        "tool_choice": Fields(ToolUseChoice.model_fields),
        "output_config": Fields(OutputConfig.model_fields),
        "thinking": Fields(Thinking.model_fields),
    },
)


def parse_messages(
    data: bytes, defaults: Mapping[str, float | int], reading: Reading | None = None
) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    reading = reading or Reading()
    body = validate(MessagesBody, load_object(data, MESSAGES, reading))
    chat = {name: getattr(body, name) for name in (*SamplingFields.model_fields, "model", "max_tokens", "stream")}
    messages = _messages(body)
    goes_on = bool(messages) and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    chat |= {"messages": messages, "continue_final_message": goes_on, "stop": body.stop_sequences or body.stop}
    chat["chat_template_kwargs"] = {**_thinking(body.thinking), **(body.chat_template_kwargs or {})}
    chat["tools"] = _functions(body.tools or (), reading)
    if (choice := body.tool_choice) is not None:
        chat["tool_choice"] = _CHOICES.get(choice.type) or {"type": "function", "function": {"name": choice.name}}
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    config = body.output_config or OutputConfig()
    if (shape := config.format or body.output_format) is not None:
        specified = {"name": "output", "schema": shape.get("schema")}
        chat["response_format"] = {"type": shape.get("type"), "json_schema": specified}
    try:
        return chat_request(chat, defaults)
    except RequestError as error:
        raise as_messages_say(error) from None


def as_messages_say(error: RequestError) -> RequestError:
    """An error about the chat, with the parameter's name in this API."""
    old = (error.param or "").partition("[")[0]
    new = _PARAMS.get(old, old)
    message = str(error).replace(".function.parameters", ".input_schema").replace(".function", "")
    message = new + message.removeprefix(old) if message.startswith(old) else message
    return RequestError(message, param=error.param and new, code=error.code, status=error.status)


def _thinking(thinking: Thinking | None) -> dict[str, bool]:
    """What templates call it."""
    return {} if thinking is None else dict.fromkeys(("enable_thinking", "thinking"), thinking.type != "disabled")


def _functions(tools: Sequence[dict[str, Any]], reading: Reading) -> list[dict[str, Any]]:
    """The tools that the client describes, as chats have them."""
    functions = []
    for index, tool in enumerate(tools):
        if (kind := tool.get("type", "custom")) == "custom":
            function = {name: tool.get(name) for name in ("name", "description", "strict")}
            functions.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
        else:
            reading.ignore(f"tools[{index}].{shown(str(kind))}", _TOOL)
    return functions


def _messages(body: MessagesBody) -> list[Message]:
    """Results of tools are messages of their own in a chat, and what a user says in several blocks is one."""
    if not body.messages:
        raise RequestError("messages must not be empty", param="messages")
    turns = [(turn, f"messages[{index}].content") for index, turn in enumerate(body.messages)]
    messages: list[Message] = []
    if body.system:
        turns.insert(0, (Turn(role="system", content=body.system), "system"))
    for turn, where in turns:
        if turn.role == "system":
            messages.append({"role": "system", "content": _text(turn.content, where, steady=True)})
        elif turn.role == "assistant":
            messages.append(_said(turn.content, where))
        else:
            _ask(messages, turn.content, where)
    return messages


def _ask(messages: list[Message], content: Blocks, where: str) -> None:
    """The turn of a user."""
    for index, block in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        here = f"{where}[{index}]"
        if block.get("type") == "tool_result":
            text = ("Error: " if block.get("is_error") else "") + _text(block.get("content") or "", f"{here}.content")
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += f"\n{_block(block, here)}"
        else:
            messages.append({"role": "user", "content": _block(block, here)})


def _said(content: Blocks, where: str) -> Message:
    """The turn of an assistant. Calls of another server's tools, and what is encrypted, tell this model nothing."""
    message: Message = {"role": "assistant", "content": ""}
    for index, block in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        kind = block.get("type")
        if kind == "text":
            message["content"] += _block(block, f"{where}[{index}]")
        elif kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + str(block.get("thinking") or "")
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            message.setdefault("tool_calls", []).append({"id": block.get("id"), "function": function})
    return message


def _text(content: Any, where: str, *, steady: bool = False) -> str:
    """steady: without what changes with each request."""
    if isinstance(content, list):
        texts = [_block(block, f"{where}[{index}]") for index, block in enumerate(content)]
    elif isinstance(content, str):
        texts = [content]
    else:
        raise RequestError(f"{where} must be a string or a list of blocks", param=where)
    if steady:
        texts = [text[found.end() :] if (found := _VOLATILE.match(text)) else text for text in texts]
    return "\n".join(text for text in texts if text)


def _block(block: Any, where: str) -> str:
    """The text of a block that has one. Raises: RequestError naming the block."""
    kind, text = (block.get("type"), block.get("text")) if isinstance(block, dict) else (None, None)
    if kind == "text" and isinstance(text, str):
        return text
    if kind == "tool_reference":
        return str(block.get("tool_name"))
    if kind == "search_result":
        return f"{block.get('title')}\n{block.get('source')}\n{_text(block.get('content'), f'{where}.content')}"
    source = block.get("source") if kind == "document" else None
    if isinstance(source, dict) and source.get("type") in ("text", "content"):
        text = _text(source.get("data") or source.get("content"), f"{where}.source")
        return "\n".join(str(part) for part in (block.get("title"), block.get("context"), text) if part)
    if kind in _MEDIA:
        raise RequestError(f"{where}: this model is text-only and cannot take a block of type {kind!r}", param=where)
    wrong = f"{where}.text must be a string" if kind == "text" else f"{where}: a block of type {kind!r} has no text"
    raise RequestError(wrong, param=where)
