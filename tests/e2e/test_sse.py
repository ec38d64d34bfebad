"""The stream itself: when its header comes, what keeps it alive, and how its lines end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Scripted, Server, fake

HELLO = [{"role": "user", "content": "hello"}]
STREAMS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": HELLO}, "max_tokens"),
    ("/v1/chat/completions", {"messages": HELLO, "n": 2}, "max_tokens"),
    ("/v1/completions", {"prompt": "hello"}, "max_tokens"),
    ("/v1/responses", {"input": "hello"}, "max_output_tokens"),
    ("/generate", {"text": "hello"}, "max_new_tokens"),
]
EACH = pytest.mark.parametrize(
    ("path", "body", "limit"), STREAMS, ids=[f"{path}{len(body)}" for path, body, _ in STREAMS]
)
STEP = 1.5  # seconds


@pytest.fixture(scope="module")
def slow(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A step takes long, and what keeps a stream alive comes often."""
    log = tmp_path_factory.mktemp("logs") / "slow.log"
    with Server.running(fake(model_path, delay=STEP), log, MINISGL_SSE_KEEPALIVE="0.2") as server:
        yield server


def limited(body: dict[str, Any], limit: str, tokens: int) -> dict[str, Any]:
    given = {limit: tokens}
    return {**body, **({"sampling_params": given} if "text" in body else given)}


def events_of(text: str) -> list[str]:
    """What stands between blank lines, none of it broken."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    for frame in frames:
        lines = frame.split("\n")
        assert len(lines) == 1 if lines[0].startswith(":") else all(": " in line for line in lines)
    return frames


@EACH
def test_the_header_comes_before_the_first_token(slow: Server, path: str, body: dict[str, Any], limit: str) -> None:
    asked = {**limited(body, limit, 2), "stream": True}
    answer = httpx.post(slow.url + path, json=asked, timeout=60)
    assert answer.status_code == 200
    frames = events_of(answer.text)
    comments = [frame for frame in frames if frame.startswith(":")]
    assert len(comments) >= 4
    assert frames[0] in comments, "behind a header that has waited for a token"
    data = [line.removeprefix("data: ") for frame in frames for line in frame.split("\n") if line.startswith("data: ")]
    assert [json.loads(one) for one in data if one != "[DONE]"]
    assert not frames[-1].startswith(":")


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO * 200}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]}),
    ("/v1/chat/completions", {"messages": HELLO, "logit_bias": {"4000": 1}}),
    ("/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "json_schema"}}),
    ("/v1/completions", {"prompt": ["good", ""]}),
    ("/v1/completions", {"prompt": ["hello " * 900, "good"], "n": 2}),
    ("/v1/completions", {"prompt": "x", "guided_grammar": "start: nowhere"}),
    ("/v1/responses", {"input": "hello " * 900}),
    ("/generate", {"input_ids": [9999]}),
]


@pytest.mark.parametrize(("path", "body"), REFUSED, ids=[str(body)[:40] for _, body in REFUSED])
def test_what_is_refused_has_a_status(slow: Server, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(slow.url + path, json={**body, "stream": True}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_it_can_be_switched_off(start: Callable[..., Server], model_path: Path) -> None:
    server = start(fake(model_path, delay=0.4), MINISGL_SSE_KEEPALIVE="0")
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 3, "stream": True})
    assert not any(frame.startswith(":") for frame in events_of(answer.text))
    refused = start(fake(model_path), wait=False, MINISGL_SSE_KEEPALIVE="often")
    assert refused.wait_exit() == 2
    assert "MINISGL_SSE_KEEPALIVE='often'" in refused.output()


# What `str.splitlines` takes for the end of a line.
ENDS = "a\nb\vc\fd\x1ce\x1df\x1eg\x85h\u2028i\u2029j"


@EACH
def test_no_character_ends_a_line(model: Scripted, path: str, body: dict[str, Any], limit: str) -> None:
    model.says(ENDS)
    body = limited(body, limit, 100)
    with httpx.Client(base_url=model.url, timeout=60) as http:
        streamed = http.post(path, json={**body, "stream": True}).content.decode()
        whole = http.post(path, json=body).content.decode()
    assert streamed.splitlines() == streamed.split("\n")[:-1]
    assert whole.splitlines() == [whole]
    assert json.dumps(ENDS)[1:-1] in json.dumps(json.loads(whole))
    texts = "".join(json.dumps(json.loads(line[6:])) for line in streamed.split("\n") if line.startswith("data: {"))
    assert all(json.dumps(end)[1:-1] in texts for end in "\x85\u2028\u2029")
