"""Replies as /v1/responses shows them: one output item, a message, whose only part is the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError, RequestError
from minisgl.message.frontend import UserReply
from minisgl.server.protocol_responses import ResponsesRequest, as_responses_say
from minisgl.server.render import Renderer, Totals

_STATUS = {FinishReason.LENGTH: "incomplete", FinishReason.ABORT: "cancelled"}  # else: completed


class ResponsesRenderer(Renderer):
    """The answer to one request. Events are numbered, and carry the whole text again where it ends."""

    done = b""

    def __init__(self, model: str, request: ResponsesRequest) -> None:
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._settings = _settings(model, request)
        self._texts: list[str] = []
        self._reason: FinishReason | None = None
        self._num_events = 0

    @property
    def id(self) -> str:
        return self._id

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        events = self._begin() if first else []
        if reply.text:
            self._texts.append(reply.text)
            events.append(self._text_event("output_text.delta", delta=reply.text, logprobs=[]))
        if reply.finish_reason is not None:
            self._reason = reply.finish_reason
            events += self._end()
        return events

    def last_chunks(self, totals: Totals) -> list[dict[str, Any]]:
        response = self._finished("".join(self._texts), self._reason or FinishReason.STOP, totals)
        kind = "completed" if response["status"] == "completed" else "incomplete"
        return [self._event(f"response.{kind}", response=response)]

    def refusal(self, error: RequestError) -> RequestError:
        return as_responses_say(error)

    def failure(self, error: MiniSGLError) -> list[dict[str, Any]]:
        response = self._response("failed", [])
        response["error"] = {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response=response)]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        (replies,) = choices
        reason = replies[-1].finish_reason or FinishReason.STOP
        return self._finished("".join(reply.text for reply in replies), reason, totals)

    def _begin(self) -> list[dict[str, Any]]:
        item = self._item("in_progress", None)
        return [
            self._event("response.created", response=self._response("in_progress", [])),
            self._event("response.in_progress", response=self._response("in_progress", [])),
            self._event("response.output_item.added", output_index=0, item=item),
            self._text_event("content_part.added", part=_part("")),
        ]

    def _end(self) -> list[dict[str, Any]]:
        text = "".join(self._texts)
        item = self._item(_item_status(self._reason), text)
        return [
            self._text_event("output_text.done", text=text, logprobs=[]),
            self._text_event("content_part.done", part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _text_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(f"response.{kind}", item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _finished(self, text: str, reason: FinishReason, totals: Totals) -> dict[str, Any]:
        response = self._response(_STATUS.get(reason, "completed"), [self._item(_item_status(reason), text)])
        if reason is FinishReason.LENGTH:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return {**response, "completed_at": int(time.time()), "usage": _usage(totals.usage())}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **self._settings,
            "output": output,
            "usage": None,
        }

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item_status(reason: FinishReason | None) -> str:
    return "incomplete" if reason in _STATUS else "completed"


def _settings(model: str, request: ResponsesRequest) -> dict[str, Any]:
    """What was asked for, and how it was understood."""
    body = request.body
    text_format = body.text.format if body.text is not None else None
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": request.params.temperature,
        "text": {"format": text_format or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": request.params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},  # writing costs nobody
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
