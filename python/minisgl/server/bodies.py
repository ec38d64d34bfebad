"""Bodies of requests and answers, as every route has them."""

from __future__ import annotations

import json
import os
from typing import Any

import orjson
from fastapi import Request, Response

from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError
from minisgl.server.strict import Fields, Reading, load_object

MAX_BODY_BYTES = 64 * 2**20  # unless MINISGL_MAX_BODY_BYTES says otherwise


# JSON needs no escape for them, but many a reader of lines ends one there (Python's `str.splitlines`, JavaScript's).
_LINE_ENDS = (("\x85", b"\\u0085"), ("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"))
# What a body that cannot be read begins with.
_UNREADABLE = {
    b"\x1f\x8b": "is compressed with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd",
    b"\xef\xbb\xbf": "begins with a byte order mark (BOM)",
    b"\xff\xfe": "is in UTF-16, with a byte order mark (BOM)",
    b"\xfe\xff": "is in UTF-16, with a byte order mark (BOM)",
    b"\0": "is in UTF-16 or UTF-32",
}


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


def json_response(payload: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(payload), status, headers, media_type="application/json")


async def read_json(request: Request, limit: int) -> bytes:
    """The body, unparsed. Raises: RequestError when it is too long (413) or says that it is no JSON (415)."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_long(limit)
    check_content_type(request.headers.get("content-type"))
    encoding = request.headers.get("content-encoding", "").lower()
    if encoding not in ("", "identity"):
        raise _unreadable(f"is compressed (Content-Encoding: {encoding[:50]!r})")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _too_long(limit)
    data = b"".join(chunks)
    for beginning, what in _UNREADABLE.items():
        if data.startswith(beginning) or (beginning == b"\0" and b"\0" in data[:2]):
            raise _unreadable(what)
    return data


def owner_of(request: Request) -> str:
    """Whose what it stores is, by API key."""
    return str(getattr(request.state, "owner", ""))


def reading_of(request: Request, config: ServerConfig) -> Reading:
    """How the body is to be read. Whoever sends the answer tells the client what of it was ignored."""
    request.state.reading = reading = Reading(config.strict_requests)
    return reading


async def read_object(request: Request, fields: Fields, config: ServerConfig, limit: int) -> dict[str, Any]:
    """The body, with known fields only. Raises: RequestError."""
    return load_object(await read_json(request, limit), fields, reading_of(request, config))


def check_content_type(value: str | None) -> None:
    """JSON must be said to be JSON: forms and texts are what any web page may send without asking."""
    media, _, parameters = (value or "").lower().partition(";")
    named = [parameter.strip().partition("=") for parameter in parameters.split(";")]
    charsets = [text.strip('"') for name, _, text in named if name == "charset"]
    if media.strip() != "application/json" or any(charset not in ("utf-8", "utf8") for charset in charsets):
        given = "has none" if value is None else f"is {value[:100]!r}"
        raise RequestError(f"Content-Type must be application/json in UTF-8; it {given}", status=415)


def _unreadable(what: str) -> RequestError:
    return RequestError(f"the body {what}; send plain JSON in UTF-8", status=415)


def _too_long(limit: int) -> RequestError:
    return RequestError(f"the body is longer than {limit} bytes", status=413)


def check_model(model: str | None, config: ServerConfig) -> None:
    """Raises: RequestError (404) unless it is the model that is served, by one of its names."""
    path = config.engine.model_path
    if (
        config.model_name_check
        and model is not None
        and model not in (config.served_model_name, path, os.path.basename(path.rstrip("/")))
    ):
        message = f"the model {model!r} does not exist; this server has {config.served_model_name!r}"
        raise RequestError(message, param="model", code="model_not_found", status=404)
