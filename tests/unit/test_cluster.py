"""What a router reads of requests, and what is wrong with a command line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from typing import Any

import pytest
from starlette.datastructures import Headers

from minisgl.cluster import commands
from minisgl.cluster.commands import main
from minisgl.cluster.relay import read_request
from minisgl.errors import ConfigError

LONG = "a text that is long enough for some blocks, " * 20


def blocks(path: str, body: Any, **headers: str) -> list[int]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return list(read_request(path, Headers(headers), data).blocks)


@pytest.mark.parametrize(
    ("path", "field", "first", "more"),
    [
        ("/v1/chat/completions", "messages", [{"role": "user", "content": LONG}], [{"role": "user", "content": "Go"}]),
        ("/v1/responses", "input", [{"role": "user", "content": LONG}], [{"role": "user", "content": "Go"}]),
        ("/v1/completions", "prompt", LONG, "and so on"),
        ("/generate", "input_ids", [*range(1000, 1200)], [7]),
    ],
)
def test_a_longer_conversation_begins_with_the_shorter_ones_blocks(
    path: str, field: str, first: Any, more: Any
) -> None:
    short, long = blocks(path, {field: first}), blocks(path, {field: first + more, "max_tokens": 5})
    assert len(short) > 4
    assert long[: len(short)] == short


def test_of_a_body_only_the_prompt_counts() -> None:
    plain = blocks("/v1/completions", {"prompt": LONG})
    other = {"metadata": {"a": [1, {"b": LONG}]}, "prompt_cache_key": "k" * 9999, "prompt": LONG, "max_tokens": 2**70}
    assert len(plain) > 4
    assert blocks("/v1/completions", other) == plain


def test_salts_and_keys_share_nothing() -> None:
    each = [
        blocks("/v1/completions", {"prompt": LONG}),
        blocks("/v1/completions", {"prompt": LONG, "cache_salt": "mine"}),
        blocks("/v1/completions", {"prompt": LONG}, authorization="Bearer a"),
        blocks("/v1/completions", {"prompt": LONG}, **{"x-api-key": "a"}),
    ]
    assert len({block for one in each for block in one}) == sum(map(len, each))


def test_sessions_and_who_has_what_is_asked_for() -> None:
    def read(path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, str]:
        asked = read_request(path, Headers(headers), json.dumps(body).encode())
        return asked.session, asked.keeper

    assert read("/v1/chat/completions", {"prompt_cache_key": "k"}, {}) == ("k", "")
    assert read("/v1/chat/completions", {"prompt_cache_key": "k"}, {"x-session-id": "s"}) == ("s", "")
    assert read("/v1/responses", {"previous_response_id": "resp_1"}, {}) == ("", "resp_1")
    assert read("/v1/responses", {"previous_response_id": None, "prompt_cache_key": None}, {}) == ("", "")
    assert read("/v1/completions", {"prompt_cache_key": "k" * 1025}, {}) == ("", "")
    assert read("/v1/completions", {"prompt_cache_key": "k"}, {"x-session-id": "s" * 1025}) == ("", "")
    assert read("/v1/responses/resp_2/input_items", {}, {})[1] == "resp_2"
    assert read("/trace/abc", {}, {})[1] == "abc"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b'{"prompt": {"a": 1}, "prompt_cache_key": 5}', b"{" * 9999]
)
def test_whatever_the_body_is(body: bytes) -> None:
    asked = read_request("/v1/completions", Headers({}), body)
    assert (asked.blocks, asked.session, asked.keeper) == ([], "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("serve --replicas 0", "argument --replicas: '0': expected a whole number from 1 to 4096"),
        ("serve --replica 2", "unknown argument --replica"),
        ("serve --router best", "--router"),
        ("serve --port x", "--port x"),
        ("serve --shell", "--shell: a cluster has none"),
        ("scale", "replicas"),
        ("scale many", "'many': expected a whole number"),
        ("status --url http://127.0.0.1:1", "--url http://127.0.0.1:1/cluster: no cluster answers there"),
        ("state", "invalid choice: 'state'"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(words.split())
    assert message.removeprefix("argument ") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_ray_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.3")
    with pytest.raises(
        ConfigError, match=r"needs Ray 2\.60 or newer, and this is 2\.9\.3: pip install 'minisgl\[ray\]'"
    ):
        main(["serve"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Ray 2\.60 or newer: pip install 'minisgl\[ray\]'"):
        main(["serve"])


def test_ray_without_what_its_serve_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_apart", lambda: None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delattr("ray.serve", raising=False)
    monkeypatch.delitem(sys.modules, "minisgl.cluster.owner", raising=False)
    with pytest.raises(ConfigError, match=r"^Ray Serve cannot be imported \(.*\): pip install 'minisgl\[ray\]'$"):
        main(["serve", "--port", "0"])
