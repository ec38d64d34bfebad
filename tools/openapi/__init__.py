"""Writes `server/openapi.json`: what each route takes and what it may answer. Run: python -m tools.openapi

Routes and their descriptions are the application's, bodies the models that parse requests; the rest is in files here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import yaml
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

import minisgl
from minisgl.config.args import args_from_options
from minisgl.config.resolve import prepare
from minisgl.page.routes import DOCUMENT
from minisgl.server.access import OPEN_PATHS
from minisgl.server.errors import ANTHROPIC_PATHS
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition
from minisgl.server.routes.app import create_app
from minisgl.trace.journal import Journal
from tools.request_fields import ALL_BODIES

Json = dict[str, Any]
HERE = Path(__file__).parent
_MODE: Literal["validation"] = "validation"
SCHEMA_REF = "#/components/schemas/{model}"
_ABOUT, _ERRORS, _ANSWERS = yaml.safe_load_all((HERE / "answers.yaml").read_text(encoding="utf-8"))
_SHOWN = yaml.safe_load((HERE / "shown.yaml").read_text(encoding="utf-8"))
_ROUTES, _EVENTS = yaml.safe_load_all((HERE / "routes.yaml").read_text(encoding="utf-8"))


def application() -> FastAPI:
    """The server's, of which nothing is asked but its routes."""
    frontend = SimpleNamespace(ask=print, journal=Journal(), metrics=None)
    return create_app(cast(Frontend, frontend), prepare(args_from_options({})), cast(Exposition, None))


def document() -> Json:
    """All of it. Keys may be asked for, but on `OPEN_PATHS`."""
    app = application()
    whole: Json = get_openapi(
        title=app.title,
        version=minisgl.__version__,
        description=_ABOUT,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    adapters = [(model.__name__, _MODE, TypeAdapter[Any](model)) for model in ALL_BODIES]
    bodies = TypeAdapter.json_schemas(adapters, ref_template=SCHEMA_REF)[1]["$defs"]
    whole["components"] = {
        "schemas": bodies | _ANSWERS,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    told = dict(_ROUTES)
    for path, operations in whole["paths"].items():
        for method, operation in operations.items():
            operation |= _operation(path, **told.pop(f"{method.upper()} {path}"))
    assert not told, f"there are no such routes: {', '.join(told)}"
    whole["tags"] = [{"name": tag, "description": group["about"]} for tag, group in _SHOWN.items()]
    shown = {route: (tag, entry) for tag, group in _SHOWN.items() for route, entry in group["routes"].items()}
    for path, operations in whole["paths"].items():
        for method, operation in operations.items():
            _show(operation, *shown.pop(f"{method.upper()} {path}"))
    assert not shown, f"there are no such routes: {', '.join(shown)}"
    return whole


def _show(operation: Json, tag: str, entry: Json) -> None:
    """Where /docs has it, under which name, and an example of its body."""
    operation |= {"tags": [tag], "summary": entry["summary"]}
    if "example" in entry:
        operation["requestBody"]["content"]["application/json"]["example"] = entry["example"]


def _operation(
    path: str,
    answer: str | dict[str, str] | None = None,
    body: str | None = None,
    errors: tuple[int, ...] = (),
    events: str | None = None,
    texts: tuple[str, ...] = (),
) -> Json:
    """One entry of `routes.yaml`, in OpenAPI's words."""
    schema: Json = {"type": "string"} if texts else _ref(answer) if isinstance(answer, str) else _object(answer or {})
    content: Json = {media: {"schema": schema} for media in texts or ["application/json"]}
    if events is not None:
        content = content if answer is not None else {}
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        content["text/event-stream"] = {"itemSchema": {"description": _EVENTS[events], **event}}
    is_open = path in OPEN_PATHS
    statuses = {*errors, *((400, 413, 415) if body is not None else ()), *(() if is_open else (401, 429)), 403, 500}
    kind = "AnthropicError" if ANTHROPIC_PATHS.match(path) else "ErrorBody"
    operation: Json = {"responses": {"200": {"description": "As asked.", "content": content}}}
    for status in sorted(statuses):
        failed = {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(kind)}}}
        operation["responses"][str(status)] = failed
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return operation if is_open else operation | {"security": [{}, {"key": []}]}


def _object(types: dict[str, str]) -> Json:
    properties = {name: {"type": kind} for name, kind in types.items()}
    return {"type": "object", "required": [*types], "properties": properties}


def _ref(name: str) -> Json:
    return {"$ref": SCHEMA_REF.format(model=name)}


def text() -> str:
    return json.dumps(document(), indent=1, sort_keys=True) + "\n"


def main() -> None:
    DOCUMENT.write_text(text(), encoding="utf-8")
