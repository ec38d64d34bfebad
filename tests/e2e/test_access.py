"""Who may use the API and how: keys, TLS, CORS, bodies, request ids and the access log."""

from __future__ import annotations

import gzip
import re
import shutil
import ssl
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from minisgl.config.args import args_from_options, parse_args
from minisgl.errors import ConfigError
from minisgl.server.launch import serve
from tests.e2e.conftest import Server, fake, real
from tests.waiting import poll

KEYS = ("sk-first", "sk-second")
BODY = {"prompt": "a", "max_tokens": 2}
PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def guarded(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys, one origin, and a small body limit."""
    log = tmp_path_factory.mktemp("logs") / "guarded.log"
    command = fake(model_path, api_key=",".join(KEYS), cors_origin=PAGE)
    server = Server(command, log, MINISGL_MAX_BODY_BYTES="2000")
    yield server
    server.close()
    assert "Traceback" not in server.output()


@pytest.fixture
def http(guarded: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60, headers={"authorization": f"Bearer {KEYS[0]}"}) as made:
        yield made


def test_each_key_opens_and_nothing_else_does(guarded: Server) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)

    for key in KEYS:
        with client(key) as known:
            assert known.models.list().data
            assert known.completions.create(model="fake-model", prompt="a", max_tokens=2).choices
    for key in ("sk-firs", "sk-first2", "SK-FIRST", "sk-first,sk-second", "none"):
        with client(key) as unknown, pytest.raises(openai.AuthenticationError) as refused:
            unknown.models.list()
        assert refused.value.code == "invalid_api_key"


def test_every_path_but_health_asks_for_a_key(guarded: Server) -> None:
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert httpx.get(f"{guarded.url}/v1/health/").status_code == 200  # the same by another name
    for path in ("/v1/models", "/v1", "/openapi.json", "/nope", "/models/", "/healthy", "/health/../v1"):
        answer = httpx.get(f"{guarded.url}{path}")
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    for header in (f"Basic {KEYS[0]}", KEYS[0], "Bearer", "", "Bearer \u00e4"):
        headers = {b"authorization": header.encode("latin-1")}
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401, header
    headers = {"authorization": f"bearer  {KEYS[1]}"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


def test_keys_are_in_no_log_and_no_message(guarded: Server) -> None:
    assert not any(key in guarded.output() for key in KEYS)
    args = parse_args(["--api-key", "a1,b2", "--api-key", "c3"], {})
    assert args.api_key == ("a1", "b2", "c3")
    assert not any(key in repr(args) for key in args.api_key)
    with pytest.raises(ConfigError, match="--api-key: expected printable ASCII") as refused:
        parse_args(["--api-key", "sesame opens"], {})
    assert "sesame" not in str(refused.value)


def test_lists_of_options_come_from_all_sources(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("api-key: [x1, y2]\ncors-origin: 'https://a.org, http://b.org:81'\n")
    args = parse_args(["--config", str(file)], {"MINISGL_API_KEY": "z3"})
    assert args.api_key == ("z3",)
    assert args.cors_origin == ("https://a.org", "http://b.org:81")
    for wrong in ({"cors_origin": "a.org"}, {"cors_origin": "https://a.org/"}, {"api_key": "a,,b"}, {"api_key": []}):
        with pytest.raises(ConfigError):
            args_from_options(wrong)


def test_pages_of_the_origin_may_call(http: httpx.Client) -> None:
    asks = {"origin": PAGE, "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    allowed = httpx.options(http.base_url.join("/v1/chat/completions"), headers=asks)  # without a key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    deletes = {**asks, "access-control-request-method": "DELETE"}
    assert httpx.options(http.base_url.join("/v1/responses/x"), headers=deletes).status_code == 200
    answer = http.post("/v1/completions", json=BODY, headers={"origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert httpx.get(http.base_url.join("/v1"), headers={"origin": PAGE}).headers["access-control-allow-origin"] == PAGE
    other = http.post("/v1/completions", json=BODY, headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert httpx.options(http.base_url.join("/v1"), headers={**asks, "origin": "https://e.org"}).status_code == 400


def test_without_the_option_no_page_may_call(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1", headers={"origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_long_bodies_are_a_413(http: httpx.Client) -> None:
    text = "a" * 3000
    for answer in (
        http.post("/v1/completions", json={"prompt": text}),
        http.post("/v1/completions", content=iter([b'{"prompt": "', text.encode()])),  # chunked: no length is told
        http.post("/generate", json={"text": text}),
    ):
        assert answer.status_code in (413, 415)
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/completions", content=iter([b'{"prompt": "', text.encode()]), headers=headers)
    assert answer.status_code == 413
    assert "2000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ('application/json; profile=x; charset="utf-8"', 200),
        ("application/json; charset=utf-16", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        (None, 415),
    ],
)
def test_bodies_must_say_that_they_are_json(http: httpx.Client, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    for path in ("/v1/completions", "/generate"):
        body = b'{"prompt": "a"}' if path != "/generate" else b'{"text": "a"}'
        answer = http.post(path, content=body, headers=headers)
        assert answer.status_code == status
        assert status == 200 or "Content-Type" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "encoding", "word"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip", "gzip"),
        (gzip.compress(b"{}", mtime=0), None, "gzip"),
        (b"x", "br", "br"),
        (zlib.compress(b"{}"), "deflate", "deflate"),
        (b"x", "gzip, deflate", "compressed"),
        ("\ufeff{}".encode(), None, "byte order mark"),
        ("{}".encode("utf-16"), None, "UTF-16"),
        ("{}".encode("utf-16-be"), None, "UTF-16"),
        ("{}".encode("utf-16-le"), None, "UTF-16"),
        ("{}".encode("utf-32-be"), None, "UTF-32"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies_that_are_not_plain_json_are_a_415(
    http: httpx.Client, data: bytes, encoding: str | None, word: str
) -> None:
    headers = {"content-type": "application/json", **({"content-encoding": encoding} if encoding else {})}
    for path in ("/v1/completions", "/tokenize"):
        answer = http.post(path, content=data, headers=headers)
        assert (answer.status_code, "\n" in answer.json()["error"]["message"]) == (415, False)
        assert word in answer.json()["error"]["message"]
    plain = {"content-type": "application/json", "content-encoding": "identity"}
    assert http.post("/v1/completions", content=b'{"prompt": "a", "max_tokens": 1}', headers=plain).status_code == 200


def test_the_access_log_says_why_a_request_is_refused(http: httpx.Client, guarded: Server) -> None:
    secret = "this is what they asked"
    for body in (
        {"prompt": secret, "temperature": 1000},
        {"prompt": secret, "use_beam_search": True},
        {"prompt": secret, "model": "gpt-9"},
        {"prompt": secret, "stop": [[secret]]},
        {"prompt": [secret, {}]},
    ):
        assert 400 <= http.post("/v1/completions", json=body).status_code < 500
    httpx.get(f"{guarded.url}/v1/models")
    lines = guarded.output()
    for why in (
        "400 in .* refused for temperature \\(invalid_value\\)",
        "400 in .* refused for use_beam_search \\(unsupported_parameter\\)",
        "404 in .* refused for model \\(model_not_found\\)",
        "401 in .* refused for .* \\(invalid_api_key\\)",
    ):
        assert re.search(why, lines), why
    assert secret not in lines


def test_head_wherever_there_is_get_and_paths_by_other_spellings(http: httpx.Client) -> None:
    for path in ("/v1/models", "/models", "/v1", "/health", "/v1/health/", "/version", "/openapi.json"):
        got, headed = http.get(path), http.head(path)
        assert (got.status_code, headed.status_code, headed.content) == (200, 200, b""), path
        assert headed.headers["content-type"] == got.headers["content-type"]
    assert http.head("/nope").status_code == 404
    assert http.head("/v1/completions").status_code == 405
    for path in ("/completions", "/v1/completions/", "//v1//completions", "/v1/v1/completions"):
        assert http.post(path, json=BODY).status_code == 200, path
    assert http.post("/v1/tokenize/", json={"prompt": "a"}).status_code == 200
    assert http.post("/v1/generate", json={"text": "a"}).status_code == 200


def test_any_model_name_and_no_access_log_if_the_operator_says_so(
    start: Callable[..., Server], model_path: Path
) -> None:
    server = start(fake(model_path, model_name_check="off"), MINISGL_ACCESS_LOG="0")
    for path, body in (("/v1/completions", BODY), ("/tokenize", {"prompt": "a"})):
        assert httpx.post(server.url + path, json={**body, "model": "gpt-9"}, timeout=60).status_code == 200
    answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "model": "gpt-9"}, timeout=60)
    assert answer.json()["model"] == "fake-model"
    assert " id " not in server.output()
    assert parse_args(["--model-name-check", "off"], {}).model_name_check is False
    assert parse_args([], {"MINISGL_MODEL_NAME_CHECK": "on"}).model_name_check is True
    assert args_from_options({"model_name_check": False}).model_name_check is False
    with pytest.raises(ConfigError, match="--model-name-check maybe"):
        parse_args(["--model-name-check", "maybe"], {})


def test_request_ids_come_back(http: httpx.Client, guarded: Server) -> None:
    assert http.get("/v1", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = http.get("/v1").headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    for bad in ("a b", "x" * 129, "\u00e4"):
        headers = {b"x-request-id": bad.encode("latin-1")}
        assert http.get("/v1", headers=headers).headers["x-request-id"] not in (bad, made)
    assert http.get("/nope", headers={"x-request-id": "n"}).headers["x-request-id"] == "n"
    assert httpx.get(f"{guarded.url}/v1", headers={"x-request-id": "u"}).headers["x-request-id"] == "u"  # 401
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[0]) as client:
        chunks = client.completions.with_raw_response.create(
            model="fake-model", prompt="a", stream=True, extra_headers={"x-request-id": "stream-1"}
        )
        assert chunks.headers["x-request-id"] == "stream-1"
        assert client.models.list()._request_id


def test_the_access_log_has_timings_and_tokens(http: httpx.Client, guarded: Server) -> None:
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 5, "stream": stream}
        http.post("/v1/chat/completions?token=hidden", json=body, headers={"x-request-id": f"log-{stream}"})
    http.get("/v1/models/a%0Ab", headers={"x-request-id": "log-newline"})
    http.get("/health", headers={"x-request-id": "log-health"})
    told = lambda: [line for line in guarded.output().splitlines() if " id log-" in line]  # noqa: E731
    poll(lambda: len(told()) >= 3, "not all is told")
    time.sleep(0.2)
    lines = sorted(told(), key=lambda x: x.split()[-1])
    assert len(lines) == 3  # /health is not among them
    timings = r"in \d+\.\d{3} s, first byte after \d+\.\d{3} s"
    for line, stream in zip(lines, (False, True), strict=False):  # a stream's comes when all is tidied up
        pattern = rf"127\.0\.0\.1 POST /v1/chat/completions 200 {timings}, \d+ \+ 5 tokens, id log-{stream}$"
        assert re.search(pattern, line), line
    assert "GET /v1/models/a%0Ab 404" in lines[2]
    assert "secret" not in guarded.output()
    assert "hidden" not in guarded.output()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_tls(start: Callable[..., Server], model_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server = start(fake(model_path, ssl_certfile=cert, ssl_keyfile=key))
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(cert))
    with (
        httpx.Client(verify=context) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client,
    ):
        stream = client.completions.create(model="fake-model", prompt="a", max_tokens=3, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.url.replace("https", "http"))


def test_bad_certificates_are_refused_before_the_model_is_loaded(
    start: Callable[..., Server], tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    """The last one also by the command: each process more would import all of it once more."""
    cert, key = certificate
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    locked = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-in", str(key), "-aes128", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    for flags, message in (
        (["--ssl-keyfile", key], "--ssl-keyfile: it needs --ssl-certfile"),
        (["--ssl-certfile", tmp_path / "none.pem"], "none.pem: no such file"),
        (["--ssl-certfile", cert, "--ssl-keyfile", junk], "--ssl-certfile"),
        (["--ssl-certfile", junk, "--ssl-keyfile", key], "--ssl-certfile"),
        (["--ssl-certfile", cert, "--ssl-keyfile", locked], "without a password"),
        (["--ssl-certfile", cert], "--ssl-certfile"),
    ):
        command = real(tmp_path / "no-model", *map(str, flags))
        with pytest.raises(ConfigError) as refused:
            serve(parse_args(command[2:], {}))
        assert message in str(refused.value) and "\n" not in str(refused.value)
    server = start(command, wait=False)
    assert server.wait_exit() == 2
    assert server.output() == f"minisgl: error: {refused.value}\n"
