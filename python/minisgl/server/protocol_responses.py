"""POST /v1/responses: what clients may send, turned into the chat that it means.

The server keeps nothing: a conversation is sent as a whole each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import Field

from minisgl.core import MAX_COUNT
from minisgl.errors import RequestError
from minisgl.server.fields import ANY, EMPTY, FUNCTION, ITEM, JSON_SCHEMA, fields_of
from minisgl.server.protocol import GenerationRequest, chat_request
from minisgl.server.protocol_sampling import SamplingFields
from minisgl.server.response_items import messages_of
from minisgl.server.strict import Body, Fields, Reading, load_object, optional, validate

# How `chat_request` and the tokenizer name what they refuse.
_PARAMS = {"messages": "input", "prompt": "input", "response_format": "text.format"}


class TextConfig(Body):
    """`text`: what the output looks like."""

    format: dict[str, Any] | None = None


class ResponsesBody(Body, SamplingFields):
    """POST /v1/responses."""

    model: str | None = None
    input: str | list[dict[str, Any]] = Field(json_schema_extra={"minItems": 1})
    instructions: str | None = None
    max_output_tokens: int | None = optional("Most tokens of the output.", ge=1, le=MAX_COUNT)
    stream: bool | None = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


RESPONSES = fields_of(
    ResponsesBody,
    {
        **dict.fromkeys(("conversation", "previous_response_id", "prompt"), ()),
        **dict.fromkeys(("access_programs", "context_management", "image", "include", "moderation"), EMPTY),
        "truncation": ("disabled",),
    },
    {
        "input": ITEM,
        "text": Fields(("format",), ignored=("verbosity",), nested={"format": Fields(("type", *JSON_SCHEMA.known))}),
        "tools": Fields(("type", *FUNCTION.known)),
        "reasoning": ANY,
        "stream_options": Fields(ignored=("include_obfuscation",)),
    },
    dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
)


@dataclass(frozen=True, slots=True)
class ResponsesRequest(GenerationRequest):
    """Some of the body comes back in the answer."""

    body: ResponsesBody = field(kw_only=True)


def parse_responses(
    data: bytes, defaults: Mapping[str, float | int], reading: Reading | None = None
) -> ResponsesRequest:
    """Raises: RequestError naming the field at fault."""
    body = validate(ResponsesBody, load_object(data, RESPONSES, reading))
    wish = next((f"reasoning.{name}" for name, value in (body.reasoning or {}).items() if value is not None), None)
    if wish is not None:
        raise RequestError(f"{wish} is not supported; chat_template_kwargs may be, by the model", param=wish)
    sampling = {name: getattr(body, name) for name in SamplingFields.model_fields if name in body.model_fields_set}
    chat = {**sampling, "messages": _messages(body), "max_completion_tokens": body.max_output_tokens}
    if body.text is not None and body.text.format is not None:
        chat["response_format"] = _response_format(body.text.format)
    for name in ("model", "stream", "parallel_tool_calls", "chat_template_kwargs"):
        chat[name] = getattr(body, name)
    chat["tools"] = body.tools and [_tool(tool) for tool in body.tools]
    choice = body.tool_choice
    chat["tool_choice"] = _tool(choice) if isinstance(choice, dict) else choice
    try:
        parsed = chat_request(chat, defaults)
    except RequestError as error:
        raise as_responses_say(error) from None
    return ResponsesRequest(**{part.name: getattr(parsed, part.name) for part in fields(parsed)}, body=body)


def as_responses_say(error: RequestError) -> RequestError:
    """An error about the chat, with the parameter's name in this API."""
    param = error.param
    if param is not None and param.startswith("tools["):
        message, param = str(error).replace(".function", "", 1), param.replace(".function", "", 1)
        return RequestError(message, param=param, code=error.code, status=error.status)
    if param is None or param.partition("[")[0] not in _PARAMS:
        return error
    old, new = param.partition("[")[0], _PARAMS[param.partition("[")[0]]
    message = str(error).replace(old, new, 1) if str(error).startswith(old) else str(error)
    return RequestError(message, param=new, code=error.code, status=error.status)


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise RequestError("input must not be empty", param="input")
    return messages + messages_of(body.input)


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    """A tool as chats have it: there, a function has an object of its own."""
    return {"type": given.get("type"), "function": {name: given[name] for name in given if name != "type"}}


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """`text.format` as chats have it: there, a schema has an object of its own."""
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
