"""Conversations, and the fast twin of the chat template that renders them."""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

TOOLBOX_HEAD = "# Tools\n\nYou can call these functions:\n<tools>"
TOOLBOX_TAIL = '\n</tools>\nTo call one, answer with:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'


@dataclass
class Conversation:
    """Messages in order, the tools the first system block lists, and the skill it exercises."""

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    skill: str = ""


Unit = Callable[[random.Random, bool], list[Message]]
"""A skill: `unit(rng, held_out)` gives user/assistant turns; `held_out` asks for prompts that training never shows."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def turn(question: str, answer: str) -> list[Message]:
    return [user(question), assistant(answer)]


def call(name: str, arguments: dict[str, Any]) -> Tool:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def is_held_out(*key: object, every: int = 20) -> bool:
    """True for one key in `every`, by hash: such keys stand in the evaluation only, never in training."""
    return zlib.crc32("|".join(map(str, key)).encode()) % every == 0


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def render_calls(message: Message) -> str:
    """The text of an assistant message, tool calls included."""
    parts = [message["content"]] if message.get("content") else []
    for item in message.get("tool_calls") or []:
        function = item["function"]
        head = f'{{"name": {dumps(function["name"])}, "arguments": {dumps(function["arguments"])}}}'
        parts.append(f"<tool_call>\n{head}\n</tool_call>")
    return "\n".join(parts)


def render(conversation: Conversation) -> str:
    """The text that the chat template gives for `conversation`, without a generation prompt.

    Jinja is too slow for millions of documents; a test holds this function and the template together.
    """
    toolbox = ""
    if conversation.tools:
        toolbox = TOOLBOX_HEAD + "".join("\n" + dumps(tool) for tool in conversation.tools) + TOOLBOX_TAIL
    out = []
    messages = conversation.messages
    if toolbox and messages[0]["role"] != "system":
        out.append(f"<|im_start|>system\n{toolbox}<|im_end|>\n")
        toolbox = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            out.append(f"<|im_start|>assistant\n{render_calls(message)}<|im_end|>\n")
        elif role == "tool":
            opens = i == 0 or messages[i - 1]["role"] != "tool"
            closes = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            out.append("<|im_start|>user\n" if opens else "\n")
            out.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            out.append("<|im_end|>\n" if closes else "")
        else:
            text = message["content"]
            if role == "system" and toolbox:
                text = f"{text}\n\n{toolbox}" if text else toolbox
                toolbox = ""
            out.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
    return "".join(out)
