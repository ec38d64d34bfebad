"""Replies as /v1/responses shows them: output items one after the other, of reasoning, text and calls."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError
from minisgl.message.frontend import UserReply
from minisgl.parser.parts import CallPart, Part, TextPart
from minisgl.server.answers.assemble import Assembler
from minisgl.server.answers.openai import Renderer, Totals, partial_object
from minisgl.server.bodies.responses import Item, ResponsesRequest

_STATUS = {FinishReason.LENGTH: "incomplete", FinishReason.ABORT: "cancelled"}  # else: completed
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}  # of items' ids
_WHOLE = {"function_call": "arguments", "custom_tool_call": "input"}  # the field that has it all; else: text
_TEXTS = {"message": "output_text", "reasoning": "reasoning_text"} | {kind: f"{kind}_{_WHOLE[kind]}" for kind in _WHOLE}

Keep = Callable[[dict[str, Any], list[Item]], None]


@dataclass(slots=True)
class _Item:
    """An output item, as far as it has come. call: the name and id of a call."""

    kind: str  # of _PREFIXES
    id: str
    call: dict[str, str]
    text: str = ""  # or reasoning, or arguments

    def shown(self, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind in _WHOLE:
            return {**item, **self.call, _WHOLE[self.kind]: self.text}
        content = [] if status == "in_progress" else [self.part(self.text)]
        if self.kind == "reasoning":
            return {**item, "summary": [], "content": content}
        return {**item, "role": "assistant", "content": content}

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponsesRenderer(Renderer):
    """The answer to one request. Events are numbered, and carry the whole text again where it ends.

    A whole body is made of the same events, which nobody gets to see. keep: stores the response and what it answers.
    """

    done = b""

    def __init__(self, model: str, request: ResponsesRequest, assembler: Assembler, keep: Keep | None = None) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        head = {"id": self.id, "object": "response", "created_at": int(time.time())}
        nothing = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
        self._head = {**head, **nothing, **_settings(model, request)}
        self._assembler = assembler
        self._request, self._keep = request, keep
        self._custom = [tool["name"] for tool in request.tools_used if tool["type"] == "custom"]
        self._item: _Item | None = None  # that grows
        self._output: list[dict[str, Any]] = []  # those that do not any more
        self._reason = FinishReason.STOP
        self._numbers = count()  # of events

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        events: list[dict[str, Any]] = []
        if first:
            for kind in ("response.created", "response.in_progress"):
                events.append(self._event(kind, response=self._response("in_progress", [])))
        for part in self._assembler.parts(reply):
            events += self._add(part)
        if reply.finish_reason is not None:
            self._reason = reply.finish_reason
            if self._item is None:
                events += self._open("message")
            events += self._close("incomplete" if self._reason in _STATUS else "completed")
        return events

    def last_chunks(self, totals: Totals) -> list[dict[str, Any]]:
        response = self._finished(totals)
        kind = "completed" if response["status"] == "completed" else "incomplete"
        return [self._event(f"response.{kind}", response=response)]

    def failure(self, error: MiniSGLError) -> list[dict[str, Any]]:
        told = {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response={**self._response("failed", []), "error": told})]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        for reply in choices[0]:
            self.chunk(0, reply, first=False)
        return self._finished(totals)

    def _add(self, part: Part) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if isinstance(part, CallPart):
            kind, text = "function_call", part.arguments
        else:
            kind, text = ("message" if isinstance(part, TextPart) else "reasoning"), part.text
        name = part.name if isinstance(part, CallPart) else None
        if name is not None or self._item is None or self._item.kind != kind != "function_call":
            kind = "custom_tool_call" if name in self._custom else kind
            events += self._close("completed") + self._open(kind, name)
        assert self._item is not None
        if text:
            self._item.text += text
            if self._item.kind != "custom_tool_call":  # whose input must be read first
                events.append(self._item_event("delta", delta=text))
        return events

    def _open(self, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        call = {} if name is None else {"name": name, "call_id": self._assembler.new_call_id()}
        item = self._item = _Item(kind, f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", call)
        shown = item.shown("in_progress")
        events = [self._event("response.output_item.added", output_index=len(self._output), item=shown)]
        if kind not in _WHOLE:
            events.append(self._item_event("added", part=item.part("")))
        return events

    def _close(self, status: str) -> list[dict[str, Any]]:
        item = self._item
        if item is None:
            return []
        events = []
        if item.kind == "custom_tool_call":
            item.text = str(partial_object(item.text).get("input", item.text))
            events.append(self._item_event("delta", delta=item.text))
        events.append(self._item_event("done", **{_WHOLE.get(item.kind, "text"): item.text}))
        if item.kind not in _WHOLE:
            events.append(self._item_event("done", part=item.part(item.text)))
        shown = item.shown(status)
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=shown))
        self._output.append(shown)
        self._item = None
        return events

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _item_event(self, what: str, **fields: Any) -> dict[str, Any]:
        """About the text of the item that grows, or about the part that holds it."""
        item = self._item
        assert item is not None
        about = "content_part" if "part" in fields else _TEXTS[item.kind]
        if item.kind not in _WHOLE:
            fields["content_index"] = 0
        if about == "output_text":
            fields["logprobs"] = []
        return self._event(f"response.{about}.{what}", item_id=item.id, output_index=len(self._output), **fields)

    def _finished(self, totals: Totals) -> dict[str, Any]:
        response = self._response(_STATUS.get(self._reason, "completed"), self._output)
        if self._reason is FinishReason.LENGTH:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response |= {"completed_at": int(time.time()), "usage": _usage(totals.usage(), self._assembler.num_reasoning)}
        if self._keep is not None and self._request.body.store is not False:
            self._keep(response, self._request.items)
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "status": status, "output": output}


# Fields of the answer that come back as they were sent, and those that say the same to everyone.
_SENT = ("instructions", "max_output_tokens", "previous_response_id", "prompt_cache_key", "safety_identifier", "user")
_SAME = {"background": False, "max_tool_calls": None, "service_tier": "default", "top_logprobs": 0}
_FUNCTION = dict.fromkeys(("description", "parameters", "strict"))
_EMPTY_TOOL: dict[str, dict[str, Any]] = {"function": _FUNCTION, "custom": {"description": None}}


def _settings(model: str, request: ResponsesRequest) -> dict[str, Any]:
    """What was asked for, and how it was understood."""
    body = request.body
    text_format = body.text.format if body.text is not None else None
    return {
        **_SAME,
        **{name: getattr(body, name) for name in _SENT},
        "metadata": {key: str(value) for key, value in (body.metadata or {}).items()},  # OpenAI has texts only
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "temperature": request.params.temperature,
        "text": {"format": text_format or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [_EMPTY_TOOL[tool["type"]] | tool for tool in request.tools_used],
        "top_p": request.params.top_p,
        "truncation": "disabled",
    }


def _usage(usage: dict[str, Any], num_reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},  # writing costs nobody
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": usage["total_tokens"],
    }
