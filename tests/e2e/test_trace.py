"""What the server tells of requests and steps: against what clients see, and against what others may see."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.conftest import Server

STAGES = ["received", "validated", "tokenized", "queued", "admitted", "finished", "detokenized", "sent"]
A, B, ROOT = ({"authorization": f"Bearer {key}"} for key in ("alice", "bob", "root"))
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Json = dict[str, Any]


class Collector(HTTPServer):
    """An OTLP/HTTP receiver of traces."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.paths: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        self.server.paths.add(self.path)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield collector
        collector.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """The built-in model with little room: 16 pages of 16 tokens, and 32 tokens in a step."""
    room = ["--max-seq-len", "256", "--num-pages", "16", "--page-size", "16", "--max-prefill-length", "32"]
    keys = ["--api-key", "alice", "--api-key", "bob", "--admin-key", "root"]
    out = ["--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}", "--log-requests", "--log-format", "json"]
    args = ["-m", "minisgl", "--port", "0", "--speculate", "off", *room, *keys, *out]
    with Server.running(args, tmp_path_factory.mktemp("trace") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers=A) as client:
        yield client


def complete(http: httpx.Client, prompt: str, max_tokens: int = 8, **headers: str) -> tuple[str, Json]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"], answer.json()


def output_of(http: httpx.Client, request_id: str) -> Json:
    (output,) = http.get(f"/trace/{request_id}").json()["outputs"]
    return output


def events_of(output: Json, *names: str) -> list[Json]:
    return [event for event in output["events"] if event["name"] in names]


def test_a_request_has_its_stages_in_order(http: httpx.Client) -> None:
    begin = time.time()
    request_id, body = complete(http, "Once upon a time", 24)
    end = time.time()
    told = http.get(f"/trace/{request_id}").json()
    while told["outputs"][0]["events"][-1]["name"] != "sent":  # a client may have its answer before that is noted
        told = http.get(f"/trace/{request_id}").json()
    assert told == http.get(f"/trace/{body['id']}").json()
    assert (told["id"], told["response_id"], told["owner_is_you"], told["prompt"]) == (
        request_id,
        body["id"],
        True,
        None,
    )
    (output,) = told["outputs"]
    stages = {event["name"]: event for event in events_of(output, *STAGES)}
    times = [event["time"] for event in output["events"]]
    assert [*stages] == [event["name"] for event in events_of(output, *STAGES)] == STAGES
    assert [begin, *times] == sorted([begin, *times])
    assert times[-2] <= end
    assert [event["seconds"] for event in output["events"]] == pytest.approx(
        [when - times[0] for when in times], abs=1e-5
    )
    first = stages["admitted"]["time"], stages["detokenized"]["first"], stages["sent"]["first"], times[-1]
    assert [*first] == sorted(first)
    usage = body["usage"]
    assert (output["num_prompt"], output["num_output"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (stages["tokenized"]["num_tokens"], stages["finished"]["num_tokens"]) == (output["num_prompt"], 24)
    assert (output["reason"], stages["finished"]["reason"], output["num_chunks"]) == ("length", "length", 1)
    assert 0 < len(events_of(output, "decode")) <= 3


def test_chunks_are_what_the_cache_has_not_and_the_cache_is_what_usage_says(http: httpx.Client) -> None:
    prompt = "A long tale of a very small cat and a much larger dog who went to the sea. " * 5
    first, fresh = complete(http, prompt)
    output, num_prompt = output_of(http, first), fresh["usage"]["prompt_tokens"]
    chunks = [chunk["num_new"] for chunk in events_of(output, "prefill")]
    assert sum(chunks) == num_prompt - output["num_cached"]
    assert output["num_chunks"] == len(chunks) >= 3
    assert all(num_new <= 32 for num_new in chunks)
    second, again = complete(http, prompt)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert output_of(http, second)["num_cached"] == cached > num_prompt - 32
    assert [event["start"] for event in events_of(output_of(http, second), "admitted")] == [cached]


def crowd(http: httpx.Client, count: int) -> list[str]:
    """Requests that come at once, and more than there is room for; their ids."""
    with ThreadPoolExecutor(count) as threads:
        return [request_id for request_id, _ in threads.map(lambda i: complete(http, f"{i} cats", 100), range(count))]


def test_retractions_and_what_was_waited_for_are_seen(http: httpx.Client) -> None:
    outputs = [output_of(http, request_id) for request_id in crowd(http, 6)]
    assert len(outputs) == 6
    retracted = [output for output in outputs if output["num_retractions"]]
    metrics = http.get("/metrics", headers=ROOT).text
    (total,) = (line.split()[-1] for line in metrics.splitlines() if line.startswith("minisgl:num_preemptions_total{"))
    assert sum(output["num_retractions"] for output in outputs) == float(total) > 0
    for output in retracted:
        names = [event["name"] for event in events_of(output, "admitted", "retracted")]
        assert names == ["admitted", *["retracted", "admitted"] * output["num_retractions"]]
    waited = [event for output in outputs for event in events_of(output, "queued", "admitted")]
    assert any(
        queued.get("why") == "pages" and admitted["time"] - queued["time"] > 0.001
        for queued, admitted in pairwise(waited)
    )


def test_each_key_sees_its_own_and_the_operator_all(http: httpx.Client) -> None:
    request_id, body = complete(http, "Mine alone")
    other_id, _ = complete(http, "Hers alone", **B)
    for name in (request_id, body["id"]):
        assert http.get(f"/trace/{name}", headers=B).status_code == 404
        assert http.get(f"/trace/{name}", headers=ROOT).json()["owner_is_you"] is False
    part, whole = (http.get("/trace?requests=1024", headers=key).json() for key in (B, ROOT))
    assert [told["id"] for told in part["requests"]] == [other_id]
    assert {request_id, other_id} <= {told["id"] for told in whole["requests"]}
    own = {output["uid"] for told in part["requests"] for output in told["outputs"]}
    assert {row[1] for step in part["steps"] for row in step["rows"]} == own
    assert {(step["pages"], step["running"], step["waiting"]) for step in part["steps"]} == {(None, None, None)}
    assert len(whole["steps"]) > len(part["steps"]) and whole["steps"][0]["pages"]
    assert http.get("/trace", headers={"authorization": ""}).status_code == 401
    for path in ("/trace/live", "/trace/pace"):
        method = "GET" if path.endswith("live") else "POST"
        assert http.request(method, path, json={}).json()["error"]["code"] == "admin_key_required"


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/trace/nobody", 404, "no such request"),
        ("/trace?steps=2049", 400, "steps"),
        ("/trace?requests=-1", 400, "requests"),
        ("/trace?steps=" + "9" * 5000, 400, "steps"),
        ("/trace?format=pdf", 400, "format"),
    ],
)
def test_what_cannot_be_told_is_refused(http: httpx.Client, path: str, status: int, word: str) -> None:
    answer = http.get(path)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]


def test_a_request_that_is_refused_has_a_story(http: httpx.Client, server: Server) -> None:
    bodies = {"temperature": {"prompt": "x", "temperature": -1}, "prompt": {"prompt": "a b " * 400}}
    for param, body in bodies.items():
        answer = http.post("/v1/completions", json=body)
        told = http.get(f"/trace/{answer.headers['x-request-id']}").json()
        (output,) = told["outputs"]
        names = [event["name"] for event in output["events"]]
        assert names == ["received", *["validated"] * (param == "prompt"), "refused", "sent"]
        (refused,) = events_of(output, "refused")
        error = answer.json()["error"]
        assert (refused["status"], refused["param"], refused["code"]) == (400, error["param"], error["code"])
        assert output["reason"] == "refused" and error["param"] == param
        assert [line["name"] for line in told_in_log(server, told["id"], len(names))] == names
        assert http.get(f"/trace/{told['id']}", headers=B).status_code == 404
    assert http.post("/tokenize", json={"prompt": 3}).status_code == 400  # no request for outputs
    assert http.get("/trace?requests=1").json()["requests"][0]["outputs"] == [output]


def test_what_goes_on_now_and_slow_motion(http: httpx.Client, server: Server) -> None:
    def look() -> Json:
        now: Json = http.get("/trace/live", headers=ROOT).json()
        return now

    now = look()
    assert now["may_slow"] and now["pace"] == {"delay_ms": 0, "paused": False}
    assert sum(count for _, count in now["pool"]["runs"]) == now["pool"]["num_pages"] == 16
    assert http.post("/trace/pace", json={"delay_ms": 2001}, headers=ROOT).status_code == 400
    assert http.post("/trace/pace", json={"paused": True}, headers=ROOT).json()["paused"] is True
    assert look()["pace"]["paused"] is True
    ended: list[str] = []

    def run() -> None:
        with httpx.Client(base_url=server.url, headers=A, timeout=60) as client:
            ended.append(complete(client, "x")[0])

    thread = threading.Thread(target=run)
    thread.start()
    while not (now := look())["running"]:
        assert not ended
    assert http.get("/health", timeout=5).status_code == 200  # though no step begins
    (output,), (running,) = now["outputs"], now["running"]
    assert (output["uid"], output["num_output"]) == (running["uid"], 0) and output["id"]
    assert now["known"] == [running["uid"]] and now["num_inflight"] >= 1
    for _ in range(5):
        thread.join(0.1)
        assert not ended and look()["running"]
    thread.join(60)
    assert ended, "it has gone on though nobody looks"
    queued, finished = events_of(output_of(http, ended[0]), "queued", "finished")
    assert finished["time"] - queued["time"] > 0.5
    http.post("/trace/pace", json={}, headers=ROOT)
    last = http.get("/trace?steps=1", headers=ROOT).json()["steps"][0]["step"]
    later = http.get(f"/trace/live?since={last}&whole=0", headers=ROOT).json()
    assert [step["step"] for step in later["steps"]] == [last] and "pool" not in later


def test_the_chart_of_a_real_server_has_tracks_and_arrows(http: httpx.Client) -> None:
    complete(http, "For the chart")
    answer = http.get("/trace?format=perfetto")
    assert "attachment" in answer.headers["content-disposition"]
    events = answer.json()["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"api", "tokenizer", "scheduler", "engine", "detokenizer", "rows", "row 0"} <= names
    assert {event["ph"] for event in events} == set("MXbe")


def told_in_log(server: Server, request_id: str, count: int) -> list[Json]:
    """What the log tells of a request, as soon as there are so many lines."""
    deadline, lines = time.monotonic() + 60, list[Json]()
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.05)
        found = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
        lines = [line for line in found if line.get("request", {}).get("id") == request_id]
    assert all(line["level"] == "INFO" and line["role"] == "server" for line in lines)
    return [line["request"] for line in lines]


def test_the_log_has_a_line_for_each_stage(http: httpx.Client, server: Server) -> None:
    request_id, _ = complete(http, "secret words")
    assert [line["name"] for line in told_in_log(server, request_id, len(STAGES))] == STAGES
    assert "secret words" not in server.output()


def test_a_collector_gets_spans_of_the_callers_trace(http: httpx.Client, collector: Collector) -> None:
    request_id, _ = complete(http, "traced", traceparent=PARENT)
    trace_id, parent_id = (bytes.fromhex(part) for part in PARENT.split("-")[1:3])
    deadline = time.monotonic() + 60
    spans: list[Span] = []
    while len(spans) < len(STAGES) and time.monotonic() < deadline:
        time.sleep(0.1)
        spans = [span for span in collector.spans if span.trace_id == trace_id]
    assert collector.paths == {"/v1/traces"}
    (root,) = (span for span in spans if span.parent_span_id == parent_id)
    children = {span.name: span for span in spans if span.parent_span_id == root.span_id}
    assert {*children} == {*STAGES[1:]}
    (output,) = http.get(f"/trace/{request_id}").json()["outputs"]
    assert root.start_time_unix_nano / 1e9 == pytest.approx(output["events"][0]["time"], abs=1e-3)
    for span in children.values():
        assert (
            root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano
        )
    values = {one.key: one.value for one in root.attributes}
    assert values["minisgl.id"].string_value == request_id
    assert values["gen_ai.usage.output_tokens"].int_value == 8
    assert [event.name for event in root.events] == ["prefill"]
    assert any(span.trace_id != trace_id for span in collector.spans)


def test_who_has_not_the_exporter_is_told_at_once(tmp_path: Path) -> None:
    hidden = tmp_path / "opentelemetry"
    hidden.mkdir()
    (hidden / "__init__.py").touch()
    server = Server(
        ["-m", "minisgl", "--port", "0", "--otlp-endpoint", "http://127.0.0.1:1"],
        tmp_path / "log",
        wait=False,
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2] / 'python'}",
    )
    assert server.wait_exit() == 2
    assert "--otlp-endpoint needs the extra: pip install 'minisgl[otlp]'" in server.output()
