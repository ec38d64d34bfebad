"""JSON for clients, on one line; and errors in OpenAI's shape, or in Anthropic's on the paths of that API."""

import json
import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from minisgl.errors import MiniSGLError, RequestError

S = TypeVar("S", bound=Sized)
MAX_SHOWN = 64  # characters of a client's name for something, in messages
# JSON needs no escape for them, but many a reader of lines ends one there (Python's `str.splitlines`, JavaScript's).
_LINE_ENDS = (("\x85", b"\\u0085"), ("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"))


def dump_json(payload: object) -> bytes:
    """JSON on one line, whoever reads it."""
    try:
        data = orjson.dumps(payload)
    except TypeError:  # a client's number, which comes back, is too large for it
        data = json.dumps(payload).encode()
    if not data.isascii():
        for character, escaped in _LINE_ENDS:
            data = data.replace(character.encode(), escaped)
    return data


ANTHROPIC_PATHS = re.compile(r"(/v1)?/messages\b")  # whose errors are Anthropic's
_ANTHROPIC_KINDS: dict[int, str] = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())


def refuse_unless(holds: object, message: str, param: str) -> None:
    """Raises: RequestError."""
    if not holds:
        raise RequestError(message, param=param)


def at_most(most: int, what: str, name: str, values: S) -> S:
    """The values of a field. Raises: RequestError when there are more."""
    refuse_unless(len(values) <= most, f"{name} must hold at most {most} {what}, not {len(values)}", name)
    return values


def shown(name: str) -> str:
    """A client's name for something, fit for one line."""
    text = name[: MAX_SHOWN + 1] or '""'
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def json_response(payload: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(payload), status, headers, media_type="application/json")


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_payload(error: MiniSGLError) -> dict[str, Any]:
    return error_body(str(error), error.status, param=error.param, code=error.code)


def anthropic_error(payload: dict[str, Any], status: int) -> dict[str, Any]:
    """What Anthropic's clients read, made of OpenAI's error object."""
    message, code = payload["error"]["message"], payload["error"]["code"]
    numbers = re.findall(r"\d+", message)
    if code == "context_length_exceeded" and len(numbers) > 1:  # by these words clients know that they must compact
        message = f"prompt is too long: {numbers[1]} tokens > {numbers[0]} maximum"
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(scope: Scope, error: MiniSGLError) -> Response:
    """The answer in the place of what was asked for, as the log and the trace are told too."""
    scope.setdefault("state", {})["refused"] = error.status, error.param, error.code
    headers = {"retry-after": str(error.retry_after)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers = {"www-authenticate": "Bearer"}
    return _response(scope, error_payload(error), error.status, headers)


def _response(scope: Scope, payload: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    if ANTHROPIC_PATHS.match(scope["path"]):
        payload = {**anthropic_error(payload, status), "request_id": scope.get("state", {}).get("request_id")}
    return json_response(payload, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody is there to see it
        if isinstance(error, MiniSGLError):
            return error_response(request.scope, error)
        message, status, headers = f"internal error: {type(error).__name__}", 500, {}
        if isinstance(error, HTTPException):
            message, status, headers = error.detail, error.status_code, dict(error.headers or {})
            if status in (404, 405):
                message = f"{request.method} {request.url.path}: {message.lower()}"
        return _response(request.scope, error_body(message, status), status, headers)

    for kind in (MiniSGLError, ClientDisconnect, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def renamed(error: RequestError, names: Mapping[str, str] | None) -> RequestError:
    """An error about a chat, as another API says it. names: that it has for parameters (None: it is no other); a
    function is flat there."""
    if names is None:
        return error
    old, message = (error.param or "").partition("[")[0], str(error)
    param = names.get(old, error.param)
    message = names[old] + message.removeprefix(old) if old in names and message.startswith(old) else message
    for text, other in {**names, ".function": ""}.items():
        if text.startswith("."):
            message, param = message.replace(text, other, 1), param and param.replace(text, other, 1)
    return RequestError(message, param=param, code=error.code, status=error.status)
