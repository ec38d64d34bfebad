"""Token counting, and what an operator asks and does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers
from prometheus_client.parser import text_string_to_metric_families

import minisgl
from tests.e2e.conftest import Server, fake
from tests.waiting import poll

HELLO: Any = [{"role": "user", "content": "Hello world"}]
LABELS = {"model_name": "fake-model"}


@pytest.fixture(scope="module", params=[0, 2], ids=["one process", "tokenizers"])
def slow(
    request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that takes 20 ms per token, with and without tokenizers of their own."""
    log = tmp_path_factory.mktemp("logs") / "slow.log"
    with Server.running(fake(model_path, delay=0.02, num_tokenizer=request.param, max_running=4), log) as server:
        yield server


@pytest.fixture
def slow_http(slow: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slow.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tiny_path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_path)


def test_tokenize_is_what_transformers_does(http: httpx.Client, reference: Any) -> None:
    def tokens(**body: Any) -> list[int]:
        answer = http.post("/tokenize", json=body).json()
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 256
        return list(answer["tokens"])

    for text in ("Hello world", "größer 你好 🙂", "<|im_start|>user", ""):
        assert tokens(prompt=text) == reference.encode(text)
        assert tokens(prompt=text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    shown = reference.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    assert tokens(messages=HELLO, model="tiny") == reference.encode(shown, add_special_tokens=False)


def test_tokenize_tells_what_a_request_will_have(client: openai.OpenAI, http: httpx.Client) -> None:
    usage = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage
    assert usage is not None
    assert http.post("/tokenize", json={"messages": HELLO}).json()["count"] == usage.prompt_tokens


def test_detokenize(http: httpx.Client, reference: Any) -> None:
    ids = reference.encode("größer 🙂<|im_end|>")
    for skip in (True, False):
        answer = http.post("/detokenize", json={"tokens": ids, "skip_special_tokens": skip}).json()
        assert answer["prompt"] == answer["text"] == reference.decode(ids, skip_special_tokens=skip)
    assert http.post("/detokenize", json={"tokens": ids}).json()["text"] == "größer 🙂"
    assert http.post("/detokenize", json={"tokens": []}).json()["text"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "a" * 10**6}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        ("/detokenize", {"tokens": [400]}, "tokens"),
        ("/abort_request", {}, "rid"),
        ("/abort_request", {"rid": "a", "abort_all": True}, "rid"),
        ("/abort_request", {"rid": 7}, "rid"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_bodies_are_a_400_that_names_the_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert http.post(path, content=b"{").status_code == 415


def test_other_models_are_not_there(http: httpx.Client) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert http.post(path, json={**body, "model": "gpt-9"}).status_code == 404


def test_version_and_info(http: httpx.Client, tiny_path: Path) -> None:
    assert http.get("/version").json() == {"version": minisgl.__version__}
    info = http.get("/server_info").json()
    assert info["model_path"] == str(tiny_path)
    assert (info["served_model_name"], info["dtype"], info["device"]) == ("tiny", "float32", "cpu")
    assert (info["max_seq_len"], info["page_size"], info["num_tokenizer"]) == (256, 16, 1)
    assert info["num_pages"] > 0
    assert info["load"]["num_running_requests"] == 0


def test_flushing_forgets_prefixes(client: openai.OpenAI, http: httpx.Client) -> None:
    def cached() -> int:
        made = client.completions.create(model="tiny", prompt=[9] * 70, max_tokens=1)
        assert made.usage is not None
        assert made.usage.prompt_tokens_details is not None
        return made.usage.prompt_tokens_details.cached_tokens or 0

    cached()
    assert cached() == 64
    answer = http.post("/flush_cache").json()
    assert answer["status"] == "ok"
    assert answer["num_pages"] >= 4
    assert cached() == 0
    assert http.get("/flush_cache").status_code == 405


def test_flushing_leaves_running_requests_alone(slow: Server, slow_http: httpx.Client) -> None:
    """The fake engine has a planner whose pages are checked after every step."""
    body = {"prompt": "Hello world", "max_tokens": 30, "seed": 4, "ignore_eos": True}
    alone = slow_http.post("/v1/completions", json=body).json()["choices"]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(slow_http.post, "/v1/completions", json=body) for _ in range(3)]
        while not all(made.done() for made in running):
            assert slow_http.post("/flush_cache").status_code == 200
    assert all(made.result().json()["choices"] == alone for made in running)


@pytest.mark.parametrize(  # nobody knows the id of an answer that has not come
    ("by", "stream"), [("x-request-id", False), ("x-request-id", True), ("id", True), ("all", False), ("all", True)]
)
def test_abort_ends_a_request_for_its_client(slow_http: httpx.Client, stream: bool, by: str) -> None:
    body = {"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": stream, "n": 2}
    name = f"abort-{stream}-{by}"

    def abort(rid: str) -> None:
        wanted = {"abort_all": True} if by == "all" else {"rid": ["unknown", rid, rid]}
        assert slow_http.post("/abort_request", json=wanted).json() == {"num_aborted": 2}

    def num_tokens() -> float:
        return value(scrape(slow_http), "generation_tokens_total")

    def abort_when_it_runs() -> None:
        poll(lambda: num_tokens() > before + 2, "it does not run")
        abort(name)

    before = num_tokens()

    aborting = threading.Thread(target=abort_when_it_runs)
    if by != "id":
        aborting.start()
    ends: list[Any] = []
    with slow_http.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": name}) as answer:
        if stream:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    ends += [c["finish_reason"] for c in chunk["choices"] if c["finish_reason"]]
                    if by == "id" and not aborting.ident:
                        aborting = threading.Thread(target=abort, args=(chunk["id"],))
                        aborting.start()
            assert line == "" or line == "data: [DONE]"
        else:
            made = json.loads(answer.read())
            ends = [choice["finish_reason"] for choice in made["choices"]]
            assert 0 < made["usage"]["completion_tokens"] < 800
    aborting.join()
    assert ends == ["abort", "abort"]
    assert slow_http.post("/abort_request", json={"rid": name}).json() == {"num_aborted": 0}
    poll(lambda: slow_http.get("/server_info").json()["load"]["num_running_requests"] == 0, "it goes on")


def scrape(http: httpx.Client, **headers: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = http.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation for family in families)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples[f"minisgl:{name}", frozenset({**LABELS, **labels}.items())]


def test_metrics_count_what_happens(start: Callable[..., Server], model_path: Path) -> None:
    server = start(fake(model_path, delay=0.02))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        before = scrape(http)
        assert value(before, "generation_tokens_total") == 0
        body = {"prompt": [[5] * 20, [6] * 20], "max_tokens": 11, "ignore_eos": True}
        http.post("/v1/completions", json=body)
        http.post("/v1/completions", json=body)
        http.post("/v1/completions", json={**body, "stream": True})
        http.post("/v1/completions", json={"prompt": [10**6]})
        http.get("/v1/models/nothing")
        http.get("/no/such/path")
        after = scrape(http)
    assert value(after, "prompt_tokens_total") == 120
    assert value(after, "generation_tokens_total") == 66
    assert value(after, "prefix_cache_queries_total") == 120
    assert value(after, "prefix_cache_hits_total") == 4 * 19  # pages of one token; the last is always computed
    assert value(after, "request_success_total", finished_reason="length") == 6
    assert value(after, "request_success_total", finished_reason="error") == 1
    assert value(after, "num_requests_running") == value(after, "num_requests_waiting") == 0
    assert value(after, "kv_cache_usage_perc") == 0
    assert value(after, "num_preemptions_total") == 0
    assert value(after, "time_to_first_token_seconds_count") == 6
    assert value(after, "inter_token_latency_seconds_count") == 60
    assert 0.005 < value(after, "inter_token_latency_seconds_sum") / 60 < 2  # seconds: of twenty milliseconds and more
    assert value(after, "e2e_request_latency_seconds_count") == 7
    assert value(after, "e2e_request_latency_seconds_sum") > 6 * 0.1
    assert value(after, "request_prompt_tokens_sum") == 120
    assert value(after, "request_generation_tokens_bucket", le="10.0") == 1
    assert value(after, "request_generation_tokens_bucket", le="20.0") == 7
    assert value(after, "iteration_tokens_total_sum") == 120 - 4 * 19 + 60
    assert value(after, "iteration_num_requests_sum") == 66
    assert value(after, "iteration_num_requests_bucket", le="+Inf") == value(after, "iteration_num_requests_count")

    def requests(handler: str, status: str, method: str = "POST") -> float:
        labels = {"method": method, "handler": handler, "status": status}
        return after["http_requests_total", frozenset(labels.items())]

    assert requests("/v1/completions", "200") == 3
    assert requests("/v1/completions", "400") == 1
    assert requests("/v1/models/{model:path}", "404", "GET") == requests("none", "404", "GET") == 1
    assert any(name == "process_resident_memory_bytes" for name, _ in after)


def test_metrics_show_what_runs_and_waits(slow: Server, slow_http: httpx.Client) -> None:
    body = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True, "n": 6}
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(slow_http.post, "/v1/completions", json=body)
        during = scrape(slow_http)
        while not made.done() and value(during, "num_requests_running") < 4:
            during = scrape(slow_http)
        slow_http.post("/abort_request", json={"abort_all": True})
        made.result()
    assert value(during, "num_requests_running") == 4
    assert value(during, "num_requests_waiting") == 2
    assert 0 < value(during, "kv_cache_usage_perc") < 1


def test_metrics_come_in_the_format_that_is_asked_for(slow_http: httpx.Client) -> None:
    open_metrics = "application/openmetrics-text"
    for version in ("", "; version=1.0.0", ";version=0.0.1;q=0.5", "; version=\u00b2", "; version=9.9; escaping=a"):
        for asked in (f"{open_metrics}{version}", f"text/html, {open_metrics}{version}"):
            answer = slow_http.get("/metrics", headers={b"accept": asked.encode()})
            assert answer.headers["content-type"].startswith(f"{open_metrics}; version=1.0.0")
            assert answer.text.endswith("# EOF\n") and "\nminisgl:generation_tokens_total{" in answer.text
        answer = slow_http.get("/metrics", headers={b"accept": f"text/plain{version}".encode()})
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
