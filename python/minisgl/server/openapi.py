"""The OpenAPI document: what each route takes and what it may answer.

Bodies are those that `protocol` parses requests with. Answers are described in `answers.yaml`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, TypeAdapter

from minisgl.server.access import OPEN_PATHS
from minisgl.server.render_messages import PATHS
from minisgl.server.strict import SCHEMA_REF

Json = dict[str, Any]
_MODE: Literal["validation"] = "validation"

_DATA = Path(__file__).with_name("answers.yaml").read_text(encoding="utf-8")
_ABOUT, _ERRORS, _ANSWERS = yaml.safe_load_all(_DATA)
EVENTS = "Server-sent events, each the JSON of a part of the answer, and `data: [DONE]`. An `error` may be the last."
RESPONSE_EVENTS = "Server-sent events, named and made as OpenAI's."
MESSAGE_EVENTS = "Server-sent events, named and made as Anthropic's."


def fields(**types: str) -> Json:
    """The schema of an object that has these fields, of these types."""
    return {
        "type": "object",
        "required": [*types],
        "properties": {name: {"type": kind} for name, kind in types.items()},
    }


def documented(
    answer: str | Json,
    body: type[BaseModel] | None = None,
    *,
    errors: Iterable[int] = (),
    events: str | None = None,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """What the decorator of a route is to be told.

    answer: its name in `answers.yaml`, or its schema. errors: statuses beside those of all routes, and of all that have
    a body. events: what a stream consists of. texts: media types of an answer that is no JSON.
    """
    schema = _ref(answer) if isinstance(answer, str) else answer
    content: Json = {media: {"schema": schema} for media in texts or ["application/json"]}
    if events is not None:
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        content["text/event-stream"] = {"itemSchema": {"description": events, **event}}
    statuses = sorted({*errors, *((400, 413, 415) if body is not None else ()), 500})
    route: Json = {"responses": {200: {"description": "As asked.", "content": content}}}
    route["responses"] |= {status: _error(status) for status in statuses}
    if texts:
        route["response_class"] = PlainTextResponse
    if body is not None:
        request = {"required": True, "content": {"application/json": {"schema": _ref(body.__name__)}}}
        route["openapi_extra"] = {"requestBody": request}
    return route


def describe(app: FastAPI, bodies: Iterable[type[BaseModel]], *, keys: bool) -> None:
    """Give the application its document. bodies: of all routes. keys: are asked for, but on `OPEN_PATHS`."""

    app.openapi = functools.cache(lambda: _document(app, bodies, keys))  # type: ignore[method-assign]


def _document(app: FastAPI, bodies: Iterable[type[BaseModel]], keys: bool) -> Json:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=_ABOUT,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    components = document["components"]
    adapters = [(model.__name__, _MODE, TypeAdapter[Any](model)) for model in bodies]
    components["schemas"] |= TypeAdapter.json_schemas(adapters, ref_template=SCHEMA_REF)[1]["$defs"]
    components["schemas"] |= _ANSWERS
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
                    answer["content"]["application/json"]["schema"] = _ref("AnthropicError")
    return document


def _error(status: int) -> Json:
    return {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref("ErrorBody")}}}


def _ref(name: str) -> Json:
    return {"$ref": SCHEMA_REF.format(model=name)}
