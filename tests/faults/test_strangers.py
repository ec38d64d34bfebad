"""Who is no client: web pages of other origins, who calls the server by another's name, who writes into the log."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from minisgl.config.args import args_from_options
from minisgl.config.resolve import access_config
from minisgl.errors import ConfigError
from minisgl.server.access import is_called
from tests.faults.conftest import Server, fake
from tests.waiting import poll

EVIL = "https://evil.example"
PAGE = "https://chat.example.org"
PROMPT = {"prompt": "what a page may not push out of the cache, nor read", "max_tokens": 2}


@pytest.fixture(scope="module")
def open_server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without keys, for this machine, as most people start it; but it tells all, and believes every proxy."""
    log = tmp_path_factory.mktemp("logs") / "open.log"
    env = {"LOG_LEVEL": "DEBUG", "FORWARDED_ALLOW_IPS": "*"}
    with Server.running(fake(model_path, cors_origin=PAGE), log, **env) as server:
        yield server


@pytest.fixture
def http(open_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=open_server.url, timeout=60) as made:
        yield made


def cached(http: httpx.Client) -> int:
    usage = http.post("/v1/completions", json=PROMPT).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


FROM_PAGES = [  # what browsers say of a page's request
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"origin": EVIL, "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"content-type": "text/plain"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "multipart/form-data; boundary=x"},
]


@pytest.mark.parametrize("headers", FROM_PAGES, ids=str)
def test_pages_of_other_origins_change_nothing(http: httpx.Client, headers: dict[str, str]) -> None:
    cached(http)
    for path, body in (
        ("/flush_cache", b""),
        ("/abort_request", b'{"abort_all": true}'),
        ("/v1/completions", b'{"prompt": "a"}'),
        ("/v1/chat/completions", b""),
        ("/v1/responses/x/cancel", b""),
        ("/tokenize", b'{"prompt": "a"}'),
    ):
        for given in (headers, {"content-type": "application/json", **headers}):
            answer = http.post(path, content=body, headers=given)
            assert answer.status_code in (403, 415), (path, given)
            assert "access-control-allow-origin" not in answer.headers
    assert cached(http) > 30, "the cache was flushed"


def test_pages_of_our_own_and_programs_may(http: httpx.Client, open_server: Server) -> None:
    for headers in (
        {},
        {"origin": open_server.url},
        {"sec-fetch-site": "none"},
        {"origin": "https://behind.a.proxy", "sec-fetch-site": "same-origin"},
    ):
        assert http.post("/v1/completions", json=PROMPT, headers=headers).status_code == 200
        assert http.post("/flush_cache", headers=headers).status_code == 200
    assert http.get("/v1/models", headers={"origin": EVIL}).status_code == 200  # which the page cannot read


def test_pages_of_a_permitted_origin_may(http: httpx.Client) -> None:
    headers = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    answer = http.post("/v1/completions", json=PROMPT, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert http.post("/flush_cache", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:1919", "localhost.evil.example", "127.0.0.1.evil.io", "a.x"]
)
def test_names_that_are_not_the_servers_are_refused(http: httpx.Client, host: str) -> None:
    """A page of evil.example, whose name now means 127.0.0.1, is of the same origin for its browser."""
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/flush_cache"),
        ("GET", "/health"),
    ):
        answer = http.request(method, path, headers={"host": host})
        assert answer.status_code == 403
        assert "--allowed-hosts" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:80", "a.localhost", "127.0.0.1:9", "[::1]:1919", "10.1.2.3", ""]
)
def test_the_machines_names_and_addresses_are_known(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def knows(name: str, **options: Any) -> bool:
    return is_called(access_config(args_from_options(options)).hosts, name)


def test_which_names_are_known() -> None:
    named = {"allowed_hosts": "llm.example.org,*.corp.example"}
    for host in ("llm.example.org", "LLM.example.org.:8000", "a.corp.example", "localhost", "127.0.0.1"):
        assert knows(host, **named)
        assert knows(host, api_key="k", **named)
    for host in ("example.org", "xllm.example.org", "corp.example", "evil.example"):
        assert not knows(host, **named)
        assert not knows(host, api_key="k", **named)
        assert knows(host, api_key="k"), "where there are keys, a page has none"
        assert knows(host, allowed_hosts="*")
    for host in ("minisgl", "minisgl:80", "host.docker.internal"):  # of containers, and what nginx calls its upstreams
        assert knows(host, host="0.0.0.0")
        assert knows(host, host="127.0.0.1")
    assert not knows("evil.example", host="0.0.0.0")
    assert knows("gpu-7.example.org", host="gpu-7.example.org")
    for wrong in ("http://a.org", "a.org:80", "a b", "*a.org", "a.*", ""):
        with pytest.raises(ConfigError, match="allowed_hosts"):
            knows("x", allowed_hosts=[wrong])


def test_a_server_for_everybody_says_so_once(
    start: Callable[..., Server], model_path: Path, open_server: Server
) -> None:
    server = start(fake(model_path, host="0.0.0.0"))
    warning = "--host 0.0.0.0 without --api-key: whoever can reach port"
    poll(lambda: warning in server.output(), "it is not said")  # a thread writes the log
    assert [server.output().count(warning), open_server.output().count("without --api-key")] == [1, 0]


FORGED = "\r\n12:00:00 server INFO forged\x1b[31m\x1b]0;title\x07\u2028\u202e\x85\x00"
LINE = re.compile(r"(\d\d:\d\d:\d\d [\w-]+ (DEBUG|INFO|WARNING|ERROR) |    |minisgl serves )")


def test_nobody_writes_into_the_log(open_server: Server) -> None:
    server = open_server
    message = {"role": "user", "content": FORGED, FORGED: 1}
    tool = {"type": "function", "function": {"name": FORGED, "parameters": {"properties": {FORGED: {"not": {}}}}}}
    texts = {"model": FORGED, "user": FORGED, FORGED: FORGED, "stop": [FORGED], "cache_salt": FORGED, "temprature": 1}
    bodies: list[dict[str, Any]] = [
        {**texts, "messages": [message]},
        {"messages": [message], "tools": [tool]},
        {"messages": [message], "chat_template_kwargs": {FORGED: FORGED}},
        {"messages": [{"role": FORGED, "content": ""}], "n": FORGED},
        {"messages": [message], "response_format": {"type": "json_schema", "json_schema": {"schema": {FORGED: 1}}}},
        {"messages": [message], "structured_outputs": {"regex": FORGED + "("}},
        {"prompt": FORGED, "input": FORGED, "text": FORGED, "max_tokens": 1, FORGED * 1000: 1},
        {"rid": FORGED},
        {"prompt": FORGED, "tokens": [FORGED]},
    ]
    quoted = f"/{quote(FORGED)}/v1/models/{quote(FORGED)}?q=%0a%1b"
    evil = b"1.2.3.4" + FORGED.encode().replace(b"\r\n", b"").replace(b"\x00", b"")  # as a header may be
    headers = [(name, evil) for name in (b"x-request-id", b"x-forwarded-for", b"x-forwarded-proto", b"user-agent")]
    with httpx.Client(base_url=server.url, timeout=60) as http:
        routes = [path for path in http.get("/openapi.json").json()["paths"] if "{" not in path]
        for path in (*routes, quoted, f"/v1/models/{quoted}"):
            for body in (None, *bodies):
                method = "GET" if body is None else "POST"
                with http.stream(method, path, json=body, headers=headers) as answer:  # one of them never ends
                    assert answer.status_code < 500, path
        for odd in (
            b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % evil,
            b"\x1b[31m\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\n\x1b:\r\n\r\n",
        ):
            send(server.url, odd)
    poll(lambda: "forged" in server.output(), "nothing of it was logged: the test proves nothing")
    time.sleep(0.5)
    for line in server.log.read_bytes().decode().split("\n")[:-1]:
        assert line.isprintable(), repr(line)
        assert LINE.match(line), line
        assert len(line) < 5000
    assert "Traceback" not in server.output()


HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = b"POST %s HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("rest", [b"zz\r\n", b"-1\r\n", b"5\r\nabc\r\n0\r\n", b"2;" + b"x" * 99_999])
def test_bodies_that_are_no_http_get_one_400(open_server: Server, rest: bytes) -> None:
    for path in (b"/v1/completions", b"/nope", b"/flush_cache", b"/v1/messages", b"/health"):
        for data in (CHUNKED % path + rest, CHUNKED % path + b"3\r\n{}\n\r\n" + rest):
            answer = send(open_server.url, data)
            assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200")) or not answer, answer
            assert answer.count(b"HTTP/1.1 ") <= 2
    assert "Traceback" not in open_server.output()
    assert httpx.get(f"{open_server.url}/health", timeout=60).status_code == 200


def send(url: str, data: bytes) -> bytes:
    """Raw bytes, and what comes back until the server closes or waits."""
    parsed = httpx.URL(url)
    with socket.create_connection((parsed.host, parsed.port or 80), timeout=60) as connection:
        connection.sendall(data)
        return connection.recv(65536)
