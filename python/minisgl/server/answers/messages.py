"""Replies as /v1/messages shows them, in Anthropic's shapes: blocks of thinking, text and calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError
from minisgl.message.frontend import UserReply
from minisgl.parser.parts import CallPart, Part, TextPart
from minisgl.server.answers.assemble import Assembler
from minisgl.server.answers.openai import Renderer, Totals, event, partial_object
from minisgl.server.errors import anthropic_error, error_payload

_REASONS = {FinishReason.STOP: "end_turn", FinishReason.TOOL_CALLS: "tool_use"}  # else: it was cut off
_DELTAS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


class MessagesRenderer(Renderer):
    """The answer to one request. A whole body is made of the same blocks as the events."""

    done = b""
    keep_alive = event({"type": "ping"})

    def __init__(self, model: str, assembler: Assembler) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._assembler = assembler
        self._blocks: list[dict[str, Any]] = []  # the last one grows, while it is open
        self._is_open = False
        self._arguments = ""  # of the call that grows
        self._usage: dict[str, int] = {}  # of all, once it has ended
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        events: list[dict[str, Any]] = []
        if first:
            events += [{"type": "message_start", "message": self._message(_usage(reply))}, {"type": "ping"}]
        for part in self._assembler.parts(reply):
            events += self._add(part)
        if reply.finish_reason is not None:
            self._usage = _usage(reply)
            if not self._blocks:
                events += self._open({"type": "text", "text": ""})
            events += self._close()
            reason = self._assembler.finish_reason(reply)
            self._end["stop_reason"] = _REASONS.get(reason or FinishReason.STOP, "max_tokens")
            if reply.stop is not None and reason is FinishReason.STOP:
                self._end = {"stop_reason": "stop_sequence", "stop_sequence": reply.stop}
        return events

    def last_chunks(self, totals: Totals) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"type": "message_delta", "delta": self._end, "usage": self._usage}, {"type": "message_stop"}]

    def failure(self, error: MiniSGLError) -> list[dict[str, Any]]:
        return [anthropic_error(error_payload(error), error.status)]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:  # noqa: ARG002
        for reply in choices[0]:
            self.chunk(0, reply, first=False)
        return {**self._message(self._usage), "content": self._blocks, **self._end}

    def _message(self, usage: dict[str, int]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": []}
        return {**head, "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _add(self, part: Part) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if isinstance(part, CallPart):
            text = part.arguments
            if part.name is not None:
                call_id = self._assembler.new_call_id().replace("call_", "toolu_")
                events = self._open({"type": "tool_use", "id": call_id, "name": part.name, "input": {}})
            self._arguments += text
        else:
            block, text = "text" if isinstance(part, TextPart) else "thinking", part.text
            if not (self._is_open and self._blocks[-1]["type"] == block):
                events = self._open({"type": block, block: "", **({} if block == "text" else {"signature": ""})})
            self._blocks[-1][block] += text
        kind, field = _DELTAS[self._blocks[-1]["type"]]
        return [*events, self._delta({"type": kind, field: text})] if text else events

    def _open(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close()
        self._blocks.append(block)
        self._is_open, self._arguments = True, ""
        return [*events, {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}]

    def _close(self) -> list[dict[str, Any]]:
        if not self._is_open:
            return []
        self._is_open = False
        block, events = self._blocks[-1], []
        if block["type"] == "thinking":  # Anthropic's proof that it thought so itself: clients send it back
            block["signature"] = self.id
            events.append(self._delta({"type": "signature_delta", "signature": self.id}))
        elif block["type"] == "tool_use":
            block["input"] = partial_object(self._arguments)
        return [*events, {"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}


def _usage(reply: UserReply) -> dict[str, int]:
    """Up to this reply. Here, what was cached is no input."""
    counts = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": reply.num_cached_tokens}
    num_new = reply.num_prompt_tokens - reply.num_cached_tokens
    return {"input_tokens": num_new, **counts, "output_tokens": reply.num_output_tokens}
