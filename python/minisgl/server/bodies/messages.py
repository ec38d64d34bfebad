"""POST /v1/messages, Anthropic's API: what clients may send, turned into the chat that it means."""

from __future__ import annotations

import re
from reprlib import repr as quoted
from typing import Any, Literal

from pydantic import Field

from minisgl.core import MAX_COUNT
from minisgl.errors import RequestError
from minisgl.server.bodies.chat import chat_request
from minisgl.server.bodies.fields import NAMES, OBJECTS, Reading, load
from minisgl.server.bodies.request import GenerationRequest
from minisgl.server.bodies.sampling import Defaults, SamplingFields
from minisgl.server.bodies.strict import Body, Count, Items, optional
from minisgl.server.bodies.tools import MAX_TOOLS, functions_of

# What Anthropic's own client puts before its system prompt (`x-anthropic-billing-header: …`), for Anthropic's servers.
# It changes with each request: with it, no prompt would find its beginning in the prefix cache.
_VOLATILE = re.compile(r"(?:x-anthropic-[\w-]+:[^\n]*\n*)+")

Message = dict[str, Any]
Blocks = str | Items[dict[str, Any]]


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


class ThinkingConfig(Body):
    """Whether the model thinks first, if its chat template lets us choose. How long cannot be chosen."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class MessagesBody(Body, SamplingFields):
    """POST /v1/messages, and /v1/messages/count_tokens."""

    model: str | None = optional("The id that /v1/models shows.")
    messages: Items[Turn] = Field(json_schema_extra={"minItems": 1})
    system: Blocks | None = optional("The system prompt.")
    max_tokens: Count | None = optional("Most tokens of the output.", ge=1, le=MAX_COUNT)
    stop_sequences: Items[str] | None = optional("What ends the output; it is cut off.")
    stream: bool | None = optional("Answer with server-sent events.")
    tools: Items[dict[str, Any]] | None = optional("Those that the client describes.", maxItems=MAX_TOOLS)
    tool_choice: ToolUseChoice | None = optional("Whether the model has to call one.")
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = optional("`output_config.format`, by its older name.")
    chat_template_kwargs: dict[str, Any] | None = optional("For the chat template.")


def parse_messages(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    reading = reading or Reading()
    body = load(MessagesBody, data, reading)
    named = (*SamplingFields.model_fields, "model", "max_tokens", "stream", "chat_template_kwargs")
    chat = {name: getattr(body, name) for name in named}
    chat["messages"] = messages = _messages(body)
    last = messages[-1] if messages else {}
    chat["continue_final_message"] = last.get("role") == "assistant" and not last["tool_calls"]
    chat["stop"] = body.stop_sequences or body.stop
    chat["thinking"] = body.thinking and {"type": body.thinking.type}
    chat["tools"] = functions_of(body.tools or (), {"custom": _function}, reading, OBJECTS["described_tool"])
    chat["tool_choice"] = body.tool_choice and body.tool_choice.model_dump()
    config = body.output_config or OutputConfig()
    chat["reasoning_effort"] = config.effort
    chat["response_format"] = config.format or body.output_format
    return chat_request(chat, defaults, NAMES["MessagesBody"])


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as chats have it."""
    same = {name: tool.get(name) for name in ("name", "description", "strict")}
    return {**same, "parameters": tool.get("input_schema")}


def _messages(body: MessagesBody) -> list[Message]:
    """Results of tools are messages of their own in a chat, and what a user says in several blocks is one."""
    if not body.messages:
        raise RequestError("messages must not be empty", param="messages")
    turns = [(turn, f"messages[{index}].content") for index, turn in enumerate(body.messages)]
    if body.system:
        turns.insert(0, (Turn(role="system", content=body.system), "system"))
    messages: list[Message] = []
    for turn, where in turns:
        blocks = [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content
        if turn.role == "system":
            texts = [_block(block, f"{where}[{index}]") for index, block in enumerate(blocks)]
            steady = [text[found.end() :] if (found := _VOLATILE.match(text)) else text for text in texts]
            messages.append({"role": "system", "content": "\n".join(filter(None, steady))})
        elif turn.role == "assistant":
            calls = [block for block in blocks if block.get("type") == "tool_use"]
            said = [block for block in blocks if block.get("type") != "tool_use"]
            messages.append({"role": "assistant", "content": said, "tool_calls": calls})
        else:
            _ask(messages, blocks, where)
    return messages


def _ask(messages: list[Message], blocks: list[dict[str, Any]], where: str) -> None:
    """The turn of a user."""
    for index, block in enumerate(blocks):
        here = f"{where}[{index}]"
        if block.get("type") == "tool_result":
            text = ("Error: " if block.get("is_error") else "") + _text(block.get("content") or "", f"{here}.content")
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += ["\n", _block(block, here)]
        else:
            messages.append({"role": "user", "content": [_block(block, here)]})


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of blocks", param=where)
    return "\n".join(_block(block, f"{where}[{index}]") for index, block in enumerate(content))


def _block(block: Any, where: str) -> str:
    """The text of a block that has one. Raises: RequestError naming the block."""
    kind, source = (block.get("type"), block.get("source")) if isinstance(block, dict) else (None, None)
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        text = _text(source.get("data") or source.get("content"), f"{where}.source")
        return "\n".join(str(part) for part in (block.get("title"), block.get("context"), text) if part)
    if kind == "search_result":
        return f"{block.get('title')}\n{source}\n{_text(block.get('content'), f'{where}.content')}"
    why = f"{where}: this model is text-only and cannot take a block of type {quoted(kind)}"
    raise RequestError(f"{where}.text must be a string" if kind == "text" else why, param=where)
