"""Routes by other spellings."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from minisgl.server.access import Paths

ROUTES = ["/v1", "/v1/chat/completions", "/v1/models", "/v1/models/{model:path}", "/v1/responses/{id}", "/health"]
ROUTES += ["/generate", "/openapi.json"]


def found(path: str, method: str = "GET") -> tuple[str, str]:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["method"], scope["path"]))

    given = {"type": "http", "method": method, "path": path}
    asyncio.run(Paths(app, ROUTES)(given, None, None))  # type: ignore[arg-type]
    assert given == {"type": "http", "method": method, "path": path}  # the server looks at it, to send no body
    return seen[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/models/", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/models/a/b", "/v1/models/a/b"),
        ("/v1/models//abs/path", "/v1/models//abs/path"),
        ("/v1/models/a/models/b/", "/v1/models/a/models/b"),
        ("/responses/r1", "/v1/responses/r1"),
        ("/v1/health", "/health"),
        ("/health/", "/health"),
        ("/v1/generate", "/generate"),
        ("/v1/v1/generate", "/generate"),
        ("/v1/openapi.json", "/openapi.json"),
        ("/v1/", "/v1"),
        ("/v1/v1", "/v1"),
        ("/", "/"),
        ("/nope/", "/nope"),
        ("/v1/nope", "/v1/nope"),
        ("/health/../v1", "/health/../v1"),
        ("/v2/chat/completions", "/v2/chat/completions"),
    ],
)
def test_spellings_of_paths(path: str, expected: str) -> None:
    assert found(path) == ("GET", expected)


def test_methods() -> None:
    assert found("/health", "HEAD") == ("GET", "/health")
    assert found("/chat/completions", "POST") == ("POST", "/v1/chat/completions")
