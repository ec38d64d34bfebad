"""POST /v1/responses: what clients may send, turned into the chat that it means.

A conversation is sent as a whole each time, or goes on from a response that `ResponseStore` has.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import Field

from minisgl.core import MAX_COUNT
from minisgl.errors import RequestError
from minisgl.server.fields import OBJECTS, fields_of
from minisgl.server.protocol import Describe, GenerationRequest, chat_request, functions_of
from minisgl.server.protocol_sampling import Defaults, SamplingFields
from minisgl.server.response_items import messages_of
from minisgl.server.response_store import Item, ResponseStore
from minisgl.server.strict import Body, Count, Items, Reading, load, optional
from minisgl.utils.json_line import dump_json

MAX_SENT_BACK = 64 << 10
_LOGPROBS = "message.output_text.logprobs"
# How `chat_request` and the tokenizer name what they refuse.
_PARAMS = {
    "messages": "input",
    "prompt": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class TextConfig(Body):
    """`text`: what the output looks like."""

    format: dict[str, Any] | None = None


class ResponsesBody(Body, SamplingFields):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Items[dict[str, Any]] = Field(json_schema_extra={"minItems": 1})
    instructions: str | None = None
    max_output_tokens: Count | None = optional("Most tokens of the output.", ge=1, le=MAX_COUNT)
    stream: bool | None = None
    text: TextConfig | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    previous_response_id: str | None = optional("The conversation goes on from there; `input` is what is new.")
    store: bool | None = optional("false: the response is not kept.")
    include: Items[str] | None = optional(
        "Without effect: there is nothing to add.", items={"not": {"const": _LOGPROBS}}
    )
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_TOOL = OBJECTS["flat_tool"]
RESPONSES = fields_of(ResponsesBody)


@dataclass(frozen=True, slots=True)
class ResponsesRequest(GenerationRequest):
    """Some of the body comes back in the answer. items: of the whole conversation."""

    body: ResponsesBody = field(kw_only=True)
    items: list[Item] = field(kw_only=True)

    @property
    def tools_used(self) -> list[dict[str, Any]]:
        """Those that the model knows of."""
        typed = ({"type": "function", **tool} for tool in self.body.tools or ())
        return [tool for tool in typed if tool["type"] in tuple(_FUNCTIONS)]


def parse_responses(
    data: bytes, defaults: Defaults, reading: Reading | None = None, store: ResponseStore | None = None, owner: str = ""
) -> ResponsesRequest:
    """store, owner: where `previous_response_id` is. Raises: RequestError naming the field at fault."""
    reading = reading or Reading()
    body = load(ResponsesBody, RESPONSES, data, reading)
    if _LOGPROBS in (body.include or ()):
        raise RequestError(f"include: {_LOGPROBS} is not supported", param="include")
    for name in ("metadata", "user", "safety_identifier", "prompt_cache_key"):  # which come back with each answer
        if len(dump_json(getattr(body, name))) > MAX_SENT_BACK:
            raise RequestError(f"{name} must have at most {MAX_SENT_BACK} bytes of JSON", param=name)
    items = _conversation(body, store or ResponseStore(), owner)
    sampling = {name: getattr(body, name) for name in SamplingFields.model_fields if name in body.model_fields_set}
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    chat = {**sampling, "messages": messages + messages_of(items), "max_completion_tokens": body.max_output_tokens}
    if body.text is not None and body.text.format is not None:
        chat["response_format"] = _response_format(body.text.format)
    for name in ("model", "stream", "parallel_tool_calls", "chat_template_kwargs", "reasoning"):
        chat[name] = getattr(body, name)
    chat["tools"] = functions_of(body.tools or (), _FUNCTIONS, reading, _TOOL)
    chat["tool_choice"] = body.tool_choice
    parsed = chat_request(chat, defaults, _PARAMS)
    return ResponsesRequest(
        **{part.name: getattr(parsed, part.name) for part in fields(parsed)}, body=body, items=items
    )


def _conversation(body: ResponsesBody, store: ResponseStore, owner: str) -> list[Item]:
    """All items up to the answer, with what they refer to in its place; a reference to what is not kept is left out."""
    given = body.input if isinstance(body.input, list) else [{"role": "user", "content": body.input}]
    if not given:
        raise RequestError("input must not be empty", param="input")
    items: list[Item] = []
    if body.previous_response_id is not None:
        messages_of(given)  # what is wrong with them is told by their own numbers
        response, items = store.get(owner, body.previous_response_id, previous=True)
        items += response["output"]
    known: dict[str, Item] = {}
    for item in given:
        kind, item_id = item.get("type", "message"), item.get("id")
        item_id = item_id if item_id and isinstance(item_id, str) else f"item_{uuid.uuid4().hex}"
        if kind == "item_reference":
            if item_id not in known:
                known |= {item["id"]: item for item in store.output(owner, item_id)}
            items += [known[item_id]] if item_id in known else []
            continue
        content = item.get("content")
        if kind == "message" and isinstance(content, str):
            text = "output_text" if item.get("role") == "assistant" else "input_text"
            item = {**item, "content": [{"type": text, "text": content}]}
        items.append({**item, "type": kind, "id": item_id})
    return items


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    return {name: tool[name] for name in OBJECTS["function"].known if name in tool}


_ONE_STRING = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_FUNCTIONS: dict[str, Describe] = {
    "function": _function,
    "custom": lambda tool: {**_function(tool), "parameters": _ONE_STRING},  # what takes free text has one string
}


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """`text.format` as chats have it: there, a schema has an object of its own."""
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
