"""Several clients of one server: what one of them has asked, no other can find out or end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minisgl.config.args import args_from_options, parse_args
from minisgl.config.resolve import access_config
from minisgl.core import SamplingParams
from minisgl.errors import ConfigError
from tests.faults.conftest import Server, fake

KEYS = ("key-of-ann", "key-of-bob")
ADMIN = "key-of-the-operator"
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
    command = fake(model_path, api_key=",".join(KEYS), admin_key=ADMIN, delay=0.05, host="0.0.0.0")
    with Server.running(command, tmp_path_factory.mktemp("logs") / "tenants.log") as server:
        yield server
    assert "whoever can reach" not in server.output(), "a server with keys is not open to everybody"


@pytest.fixture(scope="module")
def sole(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = fake(model_path, api_key="key-of-all")
    with Server.running(command, tmp_path_factory.mktemp("logs") / "sole.log") as server:
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


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


OPERATORS = [("GET", "/metrics"), ("GET", "/server_info"), ("POST", "/flush_cache")]
ABORT_ALL = {"abort_all": True}


@pytest.mark.parametrize(("method", "path"), [*OPERATORS, ("HEAD", "/metrics")])
def test_what_concerns_all_clients_is_the_operators(tenants: Server, method: str, path: str) -> None:
    with httpx.Client(base_url=tenants.url, timeout=60) as http:
        for spelled in (path, f"/v1{path}", f"//{path}/", path.replace("_", "%5f").replace("m", "%6D")):
            for key in KEYS:
                refused = http.request(method, spelled, headers=bearer(key))
                assert refused.status_code == 403, spelled
                assert method == "HEAD" or refused.json()["error"]["code"] == "admin_key_required"
            assert http.request(method, spelled).status_code == 401
            assert http.request(method, spelled, headers=bearer("wrong")).status_code in (401, 429)
            assert http.request(method, spelled, headers=bearer(ADMIN)).status_code == 200
            assert http.request(method, spelled, headers={"x-api-key": ADMIN}).status_code == 200
    assert httpx.get(f"{tenants.url}/v1/models", headers=bearer(ADMIN)).status_code == 200


def test_a_key_ends_its_own_requests_only(tenants: Server) -> None:
    def abort(key: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{tenants.url}/abort_request", json=body, headers=bearer(key), timeout=60)

    with openai.OpenAI(base_url=f"{tenants.url}/v1", api_key=KEYS[0], max_retries=0, timeout=60) as ann:
        for ender in (KEYS[0], ADMIN, ""):
            stream = ann.completions.create(
                model="fake-model", prompt="a", max_tokens=400, stream=True, extra_headers={"x-request-id": "ann-1"}
            )
            answer = next(iter(stream)).id
            assert abort(KEYS[1], abort_all=True).status_code == 403
            assert abort(KEYS[1], rid=["ann-1", answer]).json() == {"num_aborted": 0}
            assert stream.response.is_closed is False
            if ender:
                assert abort(ender, rid=["ann-1"]).json() == {"num_aborted": 1}
            else:
                assert abort(ADMIN, abort_all=True).json() == {"num_aborted": 1}
            assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "abort"


def test_without_an_admin_key_only_a_sole_key_is_the_operators(
    start: Callable[..., Server], model_path: Path, alone: Server, sole: Server
) -> None:
    two = start(fake(model_path, api_key="one,two"))
    for method, path in OPERATORS:
        assert httpx.request(method, sole.url + path, headers=bearer("key-of-all"), timeout=60).status_code == 200
        for key in ("one", "two"):
            assert httpx.request(method, two.url + path, headers=bearer(key), timeout=60).status_code == 403
        assert httpx.request(method, alone.url + path, timeout=60).status_code == 200
    for key in ("one", "two"):
        assert httpx.post(f"{two.url}/abort_request", json=ABORT_ALL, headers=bearer(key)).status_code == 403


def test_an_admin_key_alone_leaves_the_rest_open(start: Callable[..., Server], model_path: Path) -> None:
    server = start(fake(model_path, admin_key=ADMIN))
    assert cached(server, "/v1/completions") == 0
    body = {**DIALECTS["/v1/completions"], "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    for method, path in OPERATORS:
        assert httpx.request(method, server.url + path).status_code == 401
        assert httpx.request(method, server.url + path, headers=bearer(ADMIN)).status_code == 200
    assert httpx.post(f"{server.url}/abort_request", json=ABORT_ALL).status_code == 401
    assert httpx.post(f"{server.url}/abort_request", json={"rid": "x"}).json() == {"num_aborted": 0}


def test_no_key_is_ever_shown(tenants: Server) -> None:
    info = httpx.get(f"{tenants.url}/server_info", headers=bearer(ADMIN), timeout=60).text
    assert not any(key in tenants.output() + info for key in (*KEYS, ADMIN))
    args = parse_args(["--admin-key", "a1"], {"MINISGL_API_KEY": "b2"})
    assert (args.admin_key, args.api_key) == (("a1",), ("b2",))
    assert parse_args([], {"MINISGL_ADMIN_KEY": "c3"}).admin_key == ("c3",)
    assert not any(key in repr(args) + repr(access_config(args)) for key in ("a1", "b2"))
    with pytest.raises(ConfigError, match="--admin-key: it is one of --api-key"):
        access_config(args_from_options({"api_key": "same", "admin_key": "same"}))


def test_keys_cannot_be_tried_fast(sole: Server) -> None:
    server = sole

    def ask(key: str) -> httpx.Response:
        return httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=60)

    assert [ask(f"wrong-{number}").status_code for number in range(10)] == [401] * 10
    begin = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [f"wrong-{number}" for number in range(32)]))
        assert time.monotonic() - begin >= 3.0, "ten a second, on however many connections"
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.headers["retry-after"] for answer in answers} == {"60"}
    begin = time.monotonic()
    assert ask("key-of-all").status_code == 200
    assert httpx.get(f"{server.url}/v1/models").status_code == 401, "no key is no guess"
    assert time.monotonic() - begin < 60
    assert "wrong-" not in server.output()
    assert "key-of-all" not in server.output()


def test_many_ids_are_no_work(alone: Server) -> None:
    """Each is looked up once, however many requests there are: a million of them stall nobody."""
    body = {"rid": [f"id-{number}" for number in range(300_000)]}
    begin = time.monotonic()
    assert httpx.post(f"{alone.url}/abort_request", json=body, timeout=60).status_code in (200, 400)
    assert time.monotonic() - begin < 20
