"""POST /v1/messages, Anthropic's API: what clients may send, turned into the chat that it means."""

import re
from reprlib import repr as quoted
from typing import Any, Literal

from pydantic import Field

from minisgl.errors import RequestError
from minisgl.server.bodies.chat import GenerationRequest, chat_request
from minisgl.server.bodies.content import MAX_TOOLS, functions_of
from minisgl.server.bodies.fields import KEYS, OBJECTS, SCHEMAS, Body, Items, MaxTokens, Object, Reading, load, optional
from minisgl.server.bodies.sampling import Defaults, SamplingFields
from minisgl.server.errors import refuse_unless

# What Anthropic's own client puts before its system prompt (`x-anthropic-billing-header: …`), for Anthropic's servers.
# It changes with each request: with it, no prompt would find its beginning in the prefix cache.
_VOLATILE = re.compile(r"\A(?:x-anthropic-[\w-]+:[^\n]*\n*)+")

Blocks = str | Items[Object]


class Turn(Body):
    """A message: text, results of tools, or what the assistant has said. No images."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ThinkingConfig(Body):
    """Whether the model thinks first, if its chat template lets us choose. How long cannot be chosen."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class MessagesBody(Body, SamplingFields):
    """POST /v1/messages, and /v1/messages/count_tokens."""

    model: str | None = optional("The id that /v1/models shows.")
    messages: Items[Turn] = Field(json_schema_extra={"minItems": 1})
    system: Blocks | None = optional("The system prompt.")
    max_tokens: MaxTokens | None = optional("Most tokens of the output.")
    stop_sequences: Items[str] | None = optional("What ends the output; it is cut off.")
    stream: bool | None = optional("Answer with server-sent events.")
    tools: Items[Object] | None = optional("Those that the client describes.", maxItems=MAX_TOOLS)
    tool_choice: Object | None = optional("Whether the model has to call one.", **SCHEMAS["tool_use_choice"])
    thinking: ThinkingConfig | None = None
    output_config: Object | None = optional("The answer's form, and the effort.", **SCHEMAS["output_config"])
    output_format: Object | None = optional("`output_config.format`, by its older name.")
    chat_template_kwargs: Object | None = optional("For the chat template.")


def parse_messages(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(MessagesBody, data, reading := reading or Reading())
    named = (*SamplingFields.model_fields, "model", "max_tokens", "stream", "tool_choice", "chat_template_kwargs")
    messages, config = _messages(body), body.output_config or {}
    last = messages[-1] if messages else {}

    def function(tool: Object) -> Object:
        kept = {key: tool.get(key) for key in ("name", "description", "strict")}
        return {**kept, "parameters": tool.get("input_schema")}

    chat = {
        **{name: getattr(body, name) for name in named},
        "messages": messages,
        "continue_final_message": last.get("role") == "assistant" and not last["tool_calls"],
        "stop": body.stop_sequences or body.stop,
        "thinking": body.thinking and body.thinking.model_dump(),
        "tools": functions_of(body.tools or (), {"custom": function}, reading, OBJECTS["described_tool"]),
        "reasoning_effort": config.get("effort"),
        "response_format": config.get("format") or body.output_format,
    }
    return chat_request(chat, defaults, KEYS["MessagesBody"])


def _messages(body: MessagesBody) -> list[Object]:
    """Results of tools are messages of their own in a chat, and what a user says in several blocks is one."""
    refuse_unless(body.messages, "messages must not be empty", "messages")
    turns = [(turn.role, turn.content, f"messages[{index}].content") for index, turn in enumerate(body.messages)]
    if body.system:
        turns.insert(0, ("system", body.system, "system"))
    messages: list[Object] = []
    for role, content, where in turns:
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role == "system":
            texts = [_VOLATILE.sub("", _block(block, f"{where}[{index}]")) for index, block in enumerate(blocks)]
            messages.append({"role": role, "content": "\n".join(filter(None, texts))})
        elif role == "assistant":
            calls = [block for block in blocks if block.get("type") == "tool_use"]
            said = [block for block in blocks if block.get("type") != "tool_use"]
            messages.append({"role": role, "content": said, "tool_calls": calls})
        else:
            _ask(messages, blocks, where)
    return messages


def _ask(messages: list[Object], blocks: list[Object], where: str) -> None:
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
    refuse_unless(isinstance(content, list), f"{where} must be a string or a list of blocks", where)
    return "\n".join(_block(block, f"{where}[{index}]") for index, block in enumerate(content))


def _block(block: Any, where: str) -> str:
    """The text of a block that has one. Raises: RequestError naming the block."""
    given = block if isinstance(block, dict) else {}
    kind, source = given.get("type"), given.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        text = _text(source.get("data") or source.get("content"), f"{where}.source")
        return "\n".join(str(part) for part in (given.get("title"), given.get("context"), text) if part)
    if kind == "search_result":
        return f"{given.get('title')}\n{source}\n{_text(given.get('content'), f'{where}.content')}"
    if kind != "text":
        message = f"{where}: this model is text-only and cannot take a block of type {quoted(kind)}"
        raise RequestError(message, param=where)
    refuse_unless(isinstance(given.get("text"), str), f"{where}.text must be a string", where)
    return str(given["text"])
