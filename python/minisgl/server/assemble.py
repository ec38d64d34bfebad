"""A choice's replies as an assistant's message in OpenAI's shape: content, reasoning and tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from minisgl.core import FinishReason
from minisgl.message.frontend import UserReply
from minisgl.parser.parts import CallPart, Chain, Parser, Part, ReasoningPart, TextPart
from minisgl.parser.registry import make_forced_parser, make_reasoning_parser, make_tool_parser
from minisgl.server.protocol_tools import ToolUse

MakeParser = Callable[[str], Parser]  # from the text with which the prompt ends


def message_parser(tool_parser: str | None, reasoning_parser: str | None, tools: ToolUse | None) -> MakeParser | None:
    """What reads the answers to a request with these tools; None: they are text and nothing else."""
    if tools is not None and tools.required:
        return lambda _: make_forced_parser(tool_parser, tools.names, tools.function)
    if reasoning_parser is None and (tools is None or tool_parser is None):
        return None

    def make(prompt_end: str) -> Parser:
        parsers = []
        if reasoning_parser is not None:
            parsers.append(make_reasoning_parser(reasoning_parser, prompt_end))
        if tools is not None and tool_parser is not None:
            parsers.append(make_tool_parser(tool_parser, tools.names))
        return Chain(*parsers) if len(parsers) == 2 else parsers[0]

    return make


def new_call_id(*, short: bool) -> str:
    """short: nine letters and digits, which Mistral's templates insist on."""
    return uuid.uuid4().hex[:9] if short else f"call_{uuid.uuid4().hex[:24]}"


class Assembler:
    """Reads one choice's replies, from the first to the last.

    make_parser: None when text is all there is.
    parallel: without it, calls after the first are dropped.
    """

    def __init__(
        self, make_parser: MakeParser | None = None, *, parallel: bool = True, short_ids: bool = False
    ) -> None:
        self._make_parser = make_parser
        self._parser: Parser | None = None
        self._parallel = parallel
        self._short_ids = short_ids
        self._num_calls = 0

    def deltas(self, reply: UserReply) -> list[dict[str, Any]]:
        """The increments of a streamed message."""
        if self._make_parser is None:
            return [{"content": reply.text}] if reply.text else []
        deltas: list[dict[str, Any]] = []
        for part in self._parts(reply):
            if isinstance(part, TextPart):
                deltas.append({"content": part.text})
            elif isinstance(part, ReasoningPart):
                deltas.append({"reasoning_content": part.text})
            else:
                if part.name is not None:
                    deltas.append(_call_delta(part.index, self._new_call(part.name)))
                if part.arguments:
                    deltas.append(_call_delta(part.index, {"function": {"arguments": part.arguments}}))
        return deltas

    def message(self, replies: Sequence[UserReply]) -> dict[str, Any]:
        """The whole message."""
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for reply in replies:
            for delta in self.deltas(reply):
                content += delta.get("content", "")
                reasoning += delta.get("reasoning_content", "")
                for call in delta.get("tool_calls", ()):
                    if "id" in call:
                        calls.append({key: value for key, value in call.items() if key != "index"})
                    else:
                        calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if not content and (calls or reasoning):
            message["content"] = None
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def finish_reason(self, reply: UserReply) -> FinishReason | None:
        """Why the choice ended, if this reply is its last."""
        is_done = reply.finish_reason is FinishReason.STOP and self._num_calls
        return FinishReason.TOOL_CALLS if is_done else reply.finish_reason

    def _parts(self, reply: UserReply) -> list[Part]:
        assert self._make_parser is not None
        if self._parser is None:
            self._parser = self._make_parser(reply.prompt_end)
        parts = self._parser.push(reply.text) if reply.text else []
        if reply.finish_reason is not None:
            parts = parts + self._parser.finish()
        self._num_calls += sum(isinstance(part, CallPart) and part.name is not None for part in parts)
        return [part for part in parts if self._parallel or not isinstance(part, CallPart) or part.index == 0]

    def _new_call(self, name: str) -> dict[str, Any]:
        call_id = new_call_id(short=self._short_ids)
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def _call_delta(index: int, call: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **call}]}
