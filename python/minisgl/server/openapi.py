"""The OpenAPI document: what each route takes and what it may answer.

Bodies are those that `protocol` parses requests with. Answers are described here and built in `render`; tests hold the
one against the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, TypeAdapter, create_model

from minisgl.server.access import OPEN_PATHS
from minisgl.server.render_messages import PATHS
from minisgl.server.strict import SCHEMA_REF

Json = dict[str, Any]
_MODE: Literal["validation"] = "validation"

_ABOUT = (
    "In requests, a field that is null counts as left out, and one that is unknown is ignored. Every answer has a "
    "header `x-request-id`: the request's, if it had one."
)
EVENTS = "Server-sent events, each the JSON of a part of the answer, and `data: [DONE]`. An `error` may be the last."
RESPONSE_EVENTS = "Server-sent events, named and made as OpenAI's."
MESSAGE_EVENTS = "Server-sent events, named and made as Anthropic's."
_ERRORS = {
    400: "The request cannot be served as it was asked; `param` names the field.",
    401: "No API key that the server knows.",
    404: "There is no such model.",
    413: "The body is too long.",
    415: "The body does not say that it is JSON.",
    500: "A fault of the server's.",
    503: "A process of the server is gone, or does not answer.",
}


_KINDS = {"": str, "int": int, "float": float, "ints": list[int], "object": Json, "objects": list[Json], "null": None}


def _object(name: str, about: str, words: str = "", /, **types: Any) -> Any:
    """The model of an object in answers. words: its fields, as `text`, `count:int` (a kind), `object=list` (one of some
    values, with | between them); with a ? behind the name, null is one too. types: fields of other types, each with a
    default if it may be missing.
    """
    fields: dict[str, Any] = {}
    for word in words.split():
        field, is_value, values = word.partition("=")
        field, _, kind = field.partition(":")
        type_: Any = Literal[tuple(values.split("|"))] if is_value else _KINDS[kind]
        fields[field.removesuffix("?")] = (type_ | None if field.endswith("?") else type_, ...)
    fields |= {field: type_ if isinstance(type_, tuple) else (type_, ...) for field, type_ in types.items()}
    return create_model(name, __doc__=about, **fields)


def _many(kind: Any) -> Any:
    return list[kind]


_COUNTS = "prompt_tokens:int completion_tokens:int total_tokens:int"
_TOKEN = "token logprob:float bytes:ints"
_TYPE = "type=invalid_request_error|server_error"
_FINISH = "finish_reason=stop|length|tool_calls|abort"
_STOP = "stop_reason=end_turn|max_tokens|stop_sequence|tool_use stop_sequence?"
_INPUT = "input_tokens:int cache_creation_input_tokens:int cache_read_input_tokens:int output_tokens:int"

ErrorDetail = _object("ErrorDetail", "What went wrong, as OpenAI tells it.", f"message {_TYPE} param? code?")
ErrorBody = _object("ErrorBody", "Every answer that is an error.", error=ErrorDetail)
AnthropicDetail = _object("AnthropicDetail", "", "type message")
_about = "An error, on the paths of Anthropic's API."
AnthropicError = _object("AnthropicError", _about, "type=error request_id", error=AnthropicDetail)
PromptDetails = _object("PromptDetails", "", "cached_tokens:int")
CompletionDetails = _object("CompletionDetails", "", "reasoning_tokens:int")
_details = {"prompt_tokens_details": PromptDetails}
Usage = _object("Usage", "", _COUNTS, **_details)
ChatUsage = _object("ChatUsage", "", _COUNTS, **_details, completion_tokens_details=CompletionDetails)
CalledFunction = _object("CalledFunction", "", "name arguments")
ToolCall = _object("ToolCall", "", "id type=function", function=CalledFunction)
_about = "`reasoning_content` and `tool_calls` are there if there are any."
_may = {"reasoning_content": (str, ""), "tool_calls": (_many(ToolCall), [])}
ChatMessage = _object("ChatMessage", _about, "role=assistant content? refusal:null", **_may)
TokenLogprob = _object("TokenLogprob", "", _TOKEN)
TokenLogprobs = _object("TokenLogprobs", "", _TOKEN, top_logprobs=_many(TokenLogprob))
ChatLogprobs = _object("ChatLogprobs", "", "refusal:null", content=_many(TokenLogprobs))
ChatChoice = _object("ChatChoice", "", f"index:int {_FINISH}", message=ChatMessage, logprobs=ChatLogprobs | None)
_head = "id object=chat.completion created:int model"
ChatCompletion = _object("ChatCompletion", "", _head, choices=_many(ChatChoice), usage=ChatUsage)
TextLogprobs = _object(
    "TextLogprobs",
    "By token. A prompt's first token has null for its values.",
    "text_offset:ints",
    token_logprobs=list[float | None],
    tokens=list[str],
    top_logprobs=list[dict[str, float] | None],
)
TextChoice = _object("TextChoice", "", f"text index:int {_FINISH}", logprobs=TextLogprobs | None)
_head = "id object=text_completion created:int model"
TextCompletion = _object("TextCompletion", "", _head, choices=_many(TextChoice), usage=Usage)
ModelResponse = _object(
    "ModelResponse",
    "The fields of OpenAI's `Response`; those of the request come back in it.",
    "id object=response created_at:int completed_at?:int status=completed|incomplete|cancelled error:null"
    " incomplete_details?:object model output:objects usage:object",
)
MessageUsage = _object("MessageUsage", "What was cached is no input.", _INPUT)
_head = f"id type=message role=assistant model content:objects {_STOP}"
MessageAnswer = _object("MessageAnswer", "The fields of Anthropic's `Message`.", _head, usage=MessageUsage)
_head = f"id {_FINISH} prompt_tokens:int completion_tokens:int cached_tokens:int"
GeneratedMeta = _object("GeneratedMeta", "", _head)
Generated = _object("Generated", "", "text output_ids:ints", meta_info=GeneratedMeta)
ModelCard = _object("ModelCard", "", "id object=model created:int owned_by root max_model_len:int")
ModelList = _object("ModelList", "", "object=list", data=_many(ModelCard))


def fields(**types: str) -> Json:
    """The schema of an object that has these fields, of these types."""
    return {
        "type": "object",
        "required": [*types],
        "properties": {name: {"type": kind} for name, kind in types.items()},
    }


def documented(
    answer: type[BaseModel] | Json,
    body: type[BaseModel] | None = None,
    *,
    errors: Iterable[int] = (),
    events: str | None = None,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """What the decorator of a route is to be told.

    answer: its model or its schema. errors: statuses beside those of all routes, and of all that have a body.
    events: what a stream consists of. texts: media types of an answer that is no JSON.
    """
    content: Json = {media: {"schema": answer} for media in texts or ["application/json"] if isinstance(answer, dict)}
    if events is not None:
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        content["text/event-stream"] = {"itemSchema": {"description": events, **event}}
    statuses = sorted({*errors, *((400, 413, 415) if body is not None else ()), 500})
    shown = {"description": "As asked.", "content": content}
    route: Json = {"responses": {200: shown if isinstance(answer, dict) else {**shown, "model": answer}}}
    route["responses"] |= {status: _error(status) for status in statuses}
    if texts:
        route["response_class"] = PlainTextResponse
    if body is not None:
        request = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
        route["openapi_extra"] = {"requestBody": request}
    return route


def describe(app: FastAPI, bodies: Iterable[type[BaseModel]], *, keys: bool) -> None:
    """Give the application its document. bodies: of all routes. keys: are asked for, but on `OPEN_PATHS`."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies, keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, bodies: Iterable[type[BaseModel]], keys: bool) -> Json:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=_ABOUT,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    components = document["components"]
    models: list[type[BaseModel]] = [ErrorBody, AnthropicError, *bodies]
    adapters = [(model.__name__, _MODE, TypeAdapter[Any](model)) for model in models]
    components["schemas"] |= TypeAdapter.json_schemas(adapters, ref_template=SCHEMA_REF)[1]["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # our routes check what they get by themselves
        components["schemas"].pop(unused, None)
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keys and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _error(401)
            if PATHS.match(path):
                for answer in (answer for status, answer in operation["responses"].items() if int(status) >= 400):
                    answer["content"]["application/json"]["schema"] = _ref(AnthropicError)
    return document


def _error(status: int) -> Json:
    return {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(ErrorBody)}}}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": SCHEMA_REF.format(model=model.__name__)}
