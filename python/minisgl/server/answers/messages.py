"""Replies as /v1/messages shows them, in Anthropic's shapes: blocks of thinking, text and calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError
from minisgl.message.frontend import UserReply
from minisgl.server.answers.assemble import Assembler, Block, Dialect
from minisgl.server.answers.renderer import Events, Renderer, Totals, event, partial_object
from minisgl.server.errors import anthropic_error, error_payload

_REASONS = {FinishReason.STOP: "end_turn", FinishReason.TOOL_CALLS: "tool_use"}  # else: it was cut off
# Of blocks: the kind of their deltas, and the field.
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessagesRenderer(Renderer, Dialect):
    """The answer to one request."""

    done = b""
    keep_alive = event({"type": "ping"})

    def __init__(self, model: str, assembler: Assembler) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._head = {"id": self.id, "type": "message", "role": "assistant", "model": model}
        self._assembler = assembler
        self._usage: dict[str, int] = {}  # of the first reply, and once it has ended, of all
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def chunk(self, index: int, reply: UserReply) -> Events:  # noqa: ARG002
        events: Events = []
        if not self._usage:
            self._usage = _usage(reply)
            events = [{"type": "message_start", "message": self._message([])}, {"type": "ping"}]
        events += self._assembler.read(reply, self)
        if reply.finish_reason is not None:
            self._usage = _usage(reply)
            reason = self._assembler.finish_reason(reply)
            self._end["stop_reason"] = _REASONS.get(reason or FinishReason.STOP, "max_tokens")
            if reply.stop is not None and reason is FinishReason.STOP:
                self._end = {"stop_reason": "stop_sequence", "stop_sequence": reply.stop}
        return events

    def last_chunks(self, totals: Totals) -> Events:  # noqa: ARG002
        return [{"type": "message_delta", "delta": self._end, "usage": self._usage}, {"type": "message_stop"}]

    def failure(self, error: MiniSGLError) -> Events:
        return [anthropic_error(error_payload(error), error.status)]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:  # noqa: ARG002
        for reply in choices[0]:
            self.chunk(0, reply)
        return self._message([self._block(block, block.text, self.id) for block in self._assembler.blocks])

    def begin(self, block: Block) -> Events:
        return [{"type": "content_block_start", "index": block.index, "content_block": self._block(block)}]

    def more(self, block: Block, text: str) -> Events:
        kind, field = _DELTAS[block.kind]
        return [{"type": "content_block_delta", "index": block.index, "delta": {"type": kind, field: text}}]

    def end(self, block: Block, reason: FinishReason | None) -> Events:  # noqa: ARG002
        signature = {"type": "signature_delta", "signature": self.id}
        signed = {"type": "content_block_delta", "index": block.index, "delta": signature}
        stop = {"type": "content_block_stop", "index": block.index}
        return [signed, stop] if block.kind == "reasoning" else [stop]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "content": content, **self._end, "usage": self._usage}

    def _block(self, block: Block, text: str = "", signature: str = "") -> dict[str, Any]:
        """signature: Anthropic's proof that it thought so itself, which clients send back."""
        if block.kind == "text":
            return {"type": "text", "text": text}
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": text, "signature": signature}
        call_id = block.call_id.replace("call_", "toolu_")
        return {"type": "tool_use", "id": call_id, "name": block.part.name, "input": partial_object(text)}


def _usage(reply: UserReply) -> dict[str, int]:
    """Up to this reply. Here, what was cached is no input."""
    counts = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": reply.num_cached_tokens}
    num_new = reply.num_prompt_tokens - reply.num_cached_tokens
    return {"input_tokens": num_new, **counts, "output_tokens": reply.num_output_tokens}
