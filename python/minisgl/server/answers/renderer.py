"""What the answers of all endpoints have in common: server-sent events, counts of tokens, and one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic_core import from_json

from minisgl.errors import MiniSGLError
from minisgl.message.frontend import UserReply
from minisgl.server.errors import error_payload
from minisgl.server.json_line import dump_json

Events = list[dict[str, Any]]


def event(payload: Mapping[str, Any]) -> bytes:
    """One SSE event, named by its `type` if it has one. The JSON is one line, so text cannot break it."""
    name = payload.get("type")
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dump_json(payload) + b"\n\n"


def partial_object(arguments: str) -> dict[str, Any]:
    """The arguments of a call, or what there is of them where it was cut off."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Totals:
    """Token counts of all choices of one request. A prompt counts once, however many choices it has."""

    def __init__(self, num_choices: int, n: int) -> None:
        self._last: list[UserReply | None] = [None] * num_choices
        self._n = n

    def add(self, index: int, reply: UserReply) -> None:
        self._last[index] = reply

    def usage(self) -> dict[str, Any]:
        first_of_prompt = [reply for reply in self._last[:: self._n] if reply is not None]
        num_prompt = sum(reply.num_prompt_tokens for reply in first_of_prompt)
        num_output = sum(reply.num_output_tokens for reply in self._last if reply is not None)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(reply.num_cached_tokens for reply in first_of_prompt)},
        }


class Renderer(Protocol):
    """One endpoint's way to show a request's replies."""

    id: str  # what the answer is called in itself
    done: bytes = b"data: [DONE]\n\n"  # what ends a stream that went well
    keep_alive: bytes = b": keep-alive\n\n"  # sent when there has been nothing else to send for a while

    def chunk(self, index: int, reply: UserReply) -> Events:
        """The events for an increment of choice `index`."""

    def last_chunks(self, totals: Totals) -> Events:  # noqa: ARG002
        """The events after the last choice: the usage, for clients that asked for it."""
        return []

    def failure(self, error: MiniSGLError) -> Events:
        """The events at the end of a stream that failed after it began."""
        return [error_payload(error)]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        """The whole answer of a request that does not stream: the replies to each choice."""
