"""Replies as /v1/messages shows them, in Anthropic's shapes: blocks of thinking, text and calls."""

from typing import Any

from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError
from minisgl.message.messages import UserReply
from minisgl.server.answers.renderer import Block, Events, MessageRenderer, event, partial_object
from minisgl.server.errors import anthropic_error, error_payload

_REASONS = {FinishReason.STOP: "end_turn", FinishReason.TOOL_CALLS: "tool_use"}  # else: it was cut off
# Of blocks: the kind of their deltas, and the field.
_CALL = ("input_json_delta", "partial_json")
_DELTAS = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking"), "call": _CALL}


class MessagesRenderer(MessageRenderer):
    """The answer to one request."""

    prefix, keep_alive = "msg_", event({"type": "ping"})

    def first_chunks(self, reply: UserReply) -> Events:
        return [{"type": "message_start", "message": self._message([], reply, None)}, {"type": "ping"}]

    def last_chunks(self) -> Events:
        end = {"delta": self._end(self.last[0]), "usage": _usage(self.last[0])}
        return [{"type": "message_delta", **end}, {"type": "message_stop"}]

    def failure(self, error: MiniSGLError) -> Events:
        return [anthropic_error(error_payload(error), error.status)]

    def finished(self) -> dict[str, Any]:
        content = [self._block(block, block.text, self.id) for block in self.assembler.blocks]
        return self._message(content, self.last[0], self.last[0])

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

    def _message(self, content: list[dict[str, Any]], reply: UserReply, last: UserReply | None) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return {**head, **self._end(last), "usage": _usage(reply)}

    def _end(self, last: UserReply | None) -> dict[str, Any]:
        reason = None if last is None else self.assembler.finish_reason(last)
        if last is not None and last.stop is not None and reason is FinishReason.STOP:
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
        return {"stop_reason": reason and _REASONS.get(reason, "max_tokens"), "stop_sequence": None}

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
