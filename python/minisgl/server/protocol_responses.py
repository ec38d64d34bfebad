"""POST /v1/responses: what clients may send, turned into the chat that it means.

The server keeps nothing: a conversation is sent as a whole each time. The rule for fields is that of `protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import ConfigDict, Field

from minisgl.core import MAX_COUNT
from minisgl.errors import RequestError
from minisgl.server.protocol import GenerationRequest, chat_request
from minisgl.server.protocol_sampling import SamplingFields
from minisgl.server.response_items import messages_of
from minisgl.server.strict import Body, asks_for_nothing, beside, load_object, optional, validate

# Known, without bearing on the output. Nothing is stored, whatever `store` says.
_NO_EFFECT = frozenset({"store", "service_tier", "prompt_cache_retention", "prompt_cache_options"})
_STATELESS = ("conversation", "previous_response_id", "prompt")
# Known, and not supported: the values, beside null, that mean the same as leaving the field out.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_STATELESS, ()),
    "access_programs": (),
    "background": (False,),
    "context_management": ([],),
    "image": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": None}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# How `chat_request` and the tokenizer name what they refuse.
_PARAMS = {"messages": "input", "prompt": "input", "response_format": "text.format"}


class TextConfig(Body):
    """`text`: what the output looks like."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(Body, SamplingFields):
    """POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=beside(_NO_EFFECT, _UNSUPPORTED))

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


@dataclass(frozen=True, slots=True)
class ResponsesRequest(GenerationRequest):
    """Some of the body comes back in the answer."""

    body: ResponsesBody = field(kw_only=True)


def parse_responses(data: bytes, defaults: Mapping[str, float | int]) -> ResponsesRequest:
    """Raises: RequestError naming the field at fault."""
    raw = load_object(data)
    _drop_known(raw)
    body = validate(ResponsesBody, raw)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise RequestError("text.verbosity is not supported", param="text.verbosity")
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


def _drop_known(raw: dict[str, Any]) -> None:
    for name in [name for name in raw if name in _UNSUPPORTED or name in _NO_EFFECT]:
        value = raw.pop(name)
        if name in _UNSUPPORTED and not asks_for_nothing(value, _UNSUPPORTED[name]):
            why = ": this server keeps no state, send the whole conversation as input" if name in _STATELESS else ""
            raise RequestError(f"{name} is not supported{why}", param=name)


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
