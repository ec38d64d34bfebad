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
from pydantic import BaseModel, TypeAdapter

from minisgl.server.access import OPEN_PATHS
from minisgl.server.strict import SCHEMA_REF

Json = dict[str, Any]
_MODE: Literal["validation"] = "validation"
Finish = Literal["stop", "length", "tool_calls", "abort"]

_ABOUT = (
    "In requests, a field that is null counts as left out, and one that is unknown is ignored. Every answer has a "
    "header `x-request-id`: the request's, if it had one."
)
EVENTS = "Server-sent events, each the JSON of a part of the answer, and `data: [DONE]`. An `error` may be the last."
RESPONSE_EVENTS = "Server-sent events, named and made as OpenAI's."
_ERRORS = {
    400: "The request cannot be served as it was asked; `param` names the field.",
    401: "No API key that the server knows.",
    404: "There is no such model.",
    413: "The body is too long.",
    415: "The body does not say that it is JSON.",
    500: "A fault of the server's.",
    503: "A process of the server is gone, or does not answer.",
}


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI tells it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatUsage(Usage):
    completion_tokens_details: CompletionDetails


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """`reasoning_content` and `tool_calls` are there if there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class TextLogprobs(BaseModel):
    """By token. A prompt's first token has null for its values."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(BaseModel):
    text: str
    index: int
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelResponse(BaseModel):
    """The fields of OpenAI's `Response`; those of the request come back in it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "cancelled"]
    error: None
    incomplete_details: Json | None
    model: str
    output: list[Json]
    usage: Json


class GeneratedMeta(BaseModel):
    id: str
    finish_reason: Finish
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generated(BaseModel):
    text: str
    output_ids: list[int]
    meta_info: GeneratedMeta


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


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
    models: list[type[BaseModel]] = [ErrorBody, *bodies]
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
    return document


def _error(status: int) -> Json:
    return {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(ErrorBody)}}}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": SCHEMA_REF.format(model=model.__name__)}
