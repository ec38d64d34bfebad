"""What the answers of all endpoints have in common: one interface, server-sent events, and counts of tokens."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from minisgl.errors import MiniSGLError
from minisgl.message.frontend import UserReply
from minisgl.server.answers.assemble import Assembler, Dialect, Events
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.errors import error_payload
from minisgl.server.json_line import dump_json


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

    def __init__(self, n: int) -> None:
        self.last: dict[int, UserReply] = {}  # by choice; `n` of each prompt follow each other
        self._n = n

    def usage(self) -> dict[str, Any]:
        first_of_prompt = [reply for index, reply in self.last.items() if index % self._n == 0]
        num_prompt = sum(reply.num_prompt_tokens for reply in first_of_prompt)
        num_output = sum(reply.num_output_tokens for reply in self.last.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(reply.num_cached_tokens for reply in first_of_prompt)},
        }


class Renderer(ABC):
    """One endpoint's way to show a request's replies. new_assembler: makes what reads those to one choice."""

    prefix = ""  # of `id`: what the answer is called in itself
    done = b"data: [DONE]\n\n"  # what ends a stream that went well
    keep_alive = b": keep-alive\n\n"  # sent when there has been nothing else to send for a while

    def __init__(self, model: str, request: GenerationRequest, new_assembler: Callable[[], Assembler]) -> None:
        self.id = self.prefix + uuid.uuid4().hex
        self._model, self._request, self._new_assembler = model, request, new_assembler

    @abstractmethod
    def chunk(self, index: int, reply: UserReply) -> Events:
        """The events for an increment of choice `index`."""

    def last_chunks(self, totals: Totals) -> Events:  # noqa: ARG002
        """The events after the last choice: the usage, for clients that asked for it."""
        return []

    def failure(self, error: MiniSGLError) -> Events:
        """The events at the end of a stream that failed after it began."""
        return [error_payload(error)]

    @abstractmethod
    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        """The whole answer of a request that does not stream: the replies to each choice."""


class MessageRenderer(Renderer, Dialect):
    """Of an answer that is one message. A whole body is made of the same blocks as the events."""

    done = b""

    def __init__(self, model: str, request: GenerationRequest, new_assembler: Callable[[], Assembler]) -> None:
        super().__init__(model, request, new_assembler)
        self.assembler = new_assembler()
        self._has_begun = False

    def chunk(self, index: int, reply: UserReply) -> Events:  # noqa: ARG002
        events = [] if self._has_begun else self.first_chunks(reply)
        self._has_begun = True
        return events + self.assembler.read(reply, self)

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        for reply in choices[0]:
            self.assembler.read(reply, self)
        return self.finished(totals)

    @abstractmethod
    def first_chunks(self, reply: UserReply) -> Events:
        """The events before the first block."""

    @abstractmethod
    def finished(self, totals: Totals) -> dict[str, Any]:
        """The whole answer, all of which has been read."""
