"""What no schema would make: each gets a refusal or an answer, and nothing of it is left behind."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from tests.e2e.conftest import Server
from tests.waiting import poll

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate", "/tokenize", "/detokenize")
DEEP = "[" * 190 + "]" * 190
VALUES = (
    "1e400",
    "1" + "0" * 400,
    "9223372036854775808",
    r'"\ud800"',
    r'"\u0000"',
    DEEP,
    "{}",
    "[{}]",
    "[[null]]",
    "-0.0",
)
FIELDS = (
    "temperature",
    "seed",
    "stop",
    "logit_bias",
    "n",
    "stream",
    "guided_json",
    "guided_regex",
    "tools",
    "metadata",
)
INPUTS = ("messages", "prompt", "input", "text", "input_ids", "tokens", "model")


@pytest.mark.parametrize("path", POSTS)
def test_hostile_values(http: httpx.Client, path: str) -> None:
    base = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a", "text": "a", "tokens": [5]}
    needed = {
        "/v1/chat/completions": "messages",
        "/v1/responses": "input",
        "/generate": "text",
        "/detokenize": "tokens",
    }
    first = needed.get(path, "prompt")
    for field in (*FIELDS, *INPUTS):
        for value in VALUES:
            given = "" if field == first else f'"{first}": {json.dumps(base[first])}, '
            answer = http.post(
                path, content=f'{{{given}"{field}": {value}}}', headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 400, 404), (field, value, answer.text)


def test_methods_and_slashes(http: httpx.Client) -> None:
    for method in ("OPTIONS", "PUT", "TRACE", "BREW"):
        for path in ("/v1/chat/completions", "/health", "/metrics", "/v1/models/tiny"):
            answer = http.request(method, path)
            assert answer.status_code == 405
            assert answer.headers["allow"]
    assert http.post("/v1/completions/").status_code == 415  # the same without the slash
    for path in ("/v1/models/%00", "/v1/models/%ff", "/v1/models/a/b", "/%2e%2e/v1"):
        assert http.get(path).status_code == 404
        assert set(http.get(path).json()) == {"error"}


def test_half_requests_and_clients_that_leave(server: Server, http: httpx.Client) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = '{"prompt": "a", "stream": %s, "ignore_eos": true, "max_tokens": 200, "n": 3}'
    texts = [f"{head}Content-Length: 50\r\n\r\n{{}}", f"{head}Transfer-Encoding: chunked\r\n\r\n5\r\n{{}}"]
    for stream in ("true", "false"):
        asked = body % stream
        texts += [f"{head}Content-Length: {len(asked)}\r\n\r\n{asked}"] * 2
    for number, text in enumerate(texts):
        with socket.create_connection(address) as connection:
            connection.sendall(text.encode())
            time.sleep(0.15 * (number % 2))
    poll(lambda: not any(http.get("/server_info").json()["load"].values()), "something is left")
    assert http.get("/health").status_code == 200
