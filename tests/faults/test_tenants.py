"""Several clients of one server: what one of them has asked, no other can find out or end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minisgl.core import SamplingParams
from tests.faults.conftest import Server, fake

KEYS = ("key-of-ann", "key-of-bob")
TEXT = "a secret that takes several pages of the cache, since they are small here"
CHAT = {"messages": [{"role": "user", "content": TEXT}]}
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 2},
    "/v1/chat/completions": {**CHAT, "max_tokens": 2},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 2},
    "/v1/messages": {**CHAT, "max_tokens": 2},
    "/generate": {"text": TEXT, "sampling_params": {"max_new_tokens": 2}},
}


@pytest.fixture(scope="module")
def tenants(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = fake(model_path, api_key=",".join(KEYS))
    with Server.running(command, tmp_path_factory.mktemp("logs") / "tenants.log") as server:
        yield server


@pytest.fixture(scope="module")
def alone(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.running(fake(model_path), tmp_path_factory.mktemp("logs") / "alone.log") as server:
        yield server


def cached(server: Server, path: str, key: str = KEYS[0], **more: Any) -> int:
    """How many tokens of its prompt a request finds in the cache."""
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(server.url + path, json={**DIALECTS[path], **more}, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    usage = told.get("usage") or told["meta_info"]
    if "cached_tokens" in usage:
        return int(usage["cached_tokens"])
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    return int(details["cached_tokens"] if details else usage["cache_read_input_tokens"])


@pytest.mark.parametrize("path", DIALECTS)
def test_prefixes_are_shared_within_a_salt_only(alone: Server, path: str) -> None:
    first = [cached(alone, path, cache_salt=f"{path}-{salt}") for salt in ("a", "b", "a\u00e4", "a" * 200)]
    assert first == [0, 0, 0, 0]
    again = [cached(alone, path, cache_salt=f"{path}-{salt}") for salt in ("a", "b", "a\u00e4", "a" * 200)]
    assert len({*again}) == 1
    assert again[0] > 30
    assert cached(alone, path, cache_salt=f"{path}-c") == 0


def test_each_key_has_its_own_prefixes_whatever_the_salt(tenants: Server) -> None:
    path = "/v1/completions"
    for more in ({}, {"cache_salt": "the same"}, {"cache_salt": KEYS[1]}):
        assert [cached(tenants, path, key, **more) for key in KEYS] == [0, 0]
        assert min(cached(tenants, path, key, **more) for key in KEYS) > 30


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("salt", ["", 7, ["a"], "a" * 257, False])
def test_what_is_no_salt_is_refused(alone: Server, path: str, salt: Any) -> None:
    answer = httpx.post(alone.url + path, json={**DIALECTS[path], "cache_salt": salt}, timeout=60)
    assert (answer.status_code, "cache_salt" in answer.text, "\n" in answer.text) == (400, True, False)


def test_a_salt_changes_no_token(alone: Server) -> None:
    def text(**more: Any) -> str:
        body = {**DIALECTS["/v1/completions"], "max_tokens": 20, "seed": 3, **more}
        return str(httpx.post(f"{alone.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])

    assert text() == text(cache_salt="x") == text(cache_salt="x")
    assert SamplingParams().cache_salt == ""
