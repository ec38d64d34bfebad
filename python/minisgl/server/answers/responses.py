"""Replies as /v1/responses shows them: output items one after the other, of reasoning, text and calls."""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError
from minisgl.message.messages import UserReply
from minisgl.server.answers.renderer import Block, Events, MessageRenderer, partial_object
from minisgl.server.bodies.responses import Item, ResponsesRequest

_STATUS = {FinishReason.LENGTH: "incomplete", FinishReason.ABORT: "cancelled"}  # else: completed
_TABLE = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())

Keep = Callable[[dict[str, Any], list[Item]], None]


@dataclass(eq=False)
class ResponsesRenderer(MessageRenderer):
    """The answer to one request. Events are numbered, and carry the whole text again where it ends.

    keep: stores the response and what it answers.
    """

    prefix = "resp_"
    request: ResponsesRequest
    keep: Keep | None = None
    item_id: str = field(default="", init=False)  # of the item that grows
    output: list[dict[str, Any]] = field(default_factory=list, init=False)  # those that do not any more
    numbers: Iterator[int] = field(default_factory=count, init=False)  # of events

    def __post_init__(self) -> None:
        super().__post_init__()
        nothing = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
        body, params, tools = self.request.body, self.request.params, self.request.tools_used
        self._custom = [tool["name"] for tool in tools if tool["type"] == "custom"]
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            **nothing,
            **_TABLE["same"],
            **{name: getattr(body, name) for name in _TABLE["sent"]},
            "metadata": {key: str(value) for key, value in (body.metadata or {}).items()},  # OpenAI has texts only
            "model": self.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "temperature": params.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_TABLE["tools"][tool["type"]] | tool for tool in tools],
            "top_p": params.top_p,
        }

    def first_chunks(self, reply: UserReply) -> Events:  # noqa: ARG002
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._response("in_progress", [])) for kind in kinds]

    def last_chunks(self) -> Events:
        response = self.finished()
        kind = "completed" if response["status"] == "completed" else "incomplete"
        return [self._event(f"response.{kind}", response=response)]

    def failure(self, error: MiniSGLError) -> Events:
        told = {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response={**self._response("failed", []), "error": told})]

    def begin(self, block: Block) -> Events:
        self.item_id = f"{self._type(block)[1]}_{uuid.uuid4().hex}"
        item = self._item(block, "", "in_progress")
        events = [self._event("response.output_item.added", output_index=block.index, item=item)]
        return events if block.kind == "call" else [*events, self._of_item(block, "added", part=_part(block, ""))]

    def more(self, block: Block, text: str) -> Events:
        if block.part.name in self._custom:  # its input must be read first
            return []
        return [self._of_item(block, "delta", delta=text)]

    def end(self, block: Block, reason: FinishReason | None) -> Events:
        text, events = block.text, []
        if block.part.name in self._custom:
            text = str(partial_object(text).get("input", text))
            events.append(self._of_item(block, "delta", delta=text))
        events.append(self._of_item(block, "done", **{self._type(block)[3]: text}))
        if block.kind != "call":
            events.append(self._of_item(block, "done", part=_part(block, text)))
        item = self._item(block, text, "incomplete" if reason in _STATUS else "completed")
        self.output.append(item)
        return [*events, self._event("response.output_item.done", output_index=block.index, item=item)]

    def _type(self, block: Block) -> list[str]:
        kinds: dict[str, list[str]] = _TABLE["types"]
        return kinds["custom" if block.part.name in self._custom else block.kind]

    def _item(self, block: Block, text: str, status: str) -> dict[str, Any]:
        kind, _, _, field = self._type(block)
        item: dict[str, Any] = {"id": self.item_id, "type": kind, "status": status}
        if block.kind == "call":
            return {**item, "name": block.part.name, "call_id": block.call_id, field: text}
        content = [] if status == "in_progress" else [_part(block, text)]
        more: dict[str, Any] = {"summary": []} if block.kind == "reasoning" else {"role": "assistant"}
        return {**item, **more, "content": content}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self.numbers), **fields}

    def _of_item(self, block: Block, what: str, **fields: Any) -> dict[str, Any]:
        """About the text of the item that grows, or about the part that holds it."""
        about = "content_part" if "part" in fields else self._type(block)[2]
        if block.kind != "call":
            fields["content_index"] = 0
        if about == "output_text":
            fields["logprobs"] = []
        return self._event(f"response.{about}.{what}", item_id=self.item_id, output_index=block.index, **fields)

    def finished(self) -> dict[str, Any]:
        reason = self.last[0].finish_reason or FinishReason.STOP
        response = self._response(_STATUS.get(reason, "completed"), self.output)
        if reason is FinishReason.LENGTH:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        usage, details = self.usage(), {"output_tokens_details": {"reasoning_tokens": self.assembler.num_reasoning}}
        response["completed_at"] = int(time.time())
        details["input_tokens_details"] = {**usage["prompt_tokens_details"], "cache_write_tokens": 0}  # costs nobody
        counts = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        response["usage"] = {**counts, **details, "total_tokens": usage["total_tokens"]}
        if self.keep is not None and self.request.body.store is not False:
            self.keep(response, self.request.items)
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "status": status, "output": output}


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
