"""Large bodies, and bodies that are wrong a million times: whatever they hold, and wherever, the answer has a bounded
price, and nobody else waits for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults.conftest import Server, fake

MIB = 2**20
HELLO = [{"role": "user", "content": "hi"}]
# What a value is made of: a beginning, what is repeated, and an end.
KINDS: dict[str, tuple[bytes, bytes, bytes]] = {
    "floats": (b"[", b"0.5,", b"0.5]"),
    "ints": (b"[", b"7,", b"7]"),
    "ids": (b"[", b"12345,", b"7]"),
    "nulls": (b"[", b"null,", b"null]"),
    "strings": (b"[", b'"",', b'""]'),
    "lists": (b"[", b"[],", b"[]]"),
    "objects": (b"[", b'{"a":1},', b"{}]"),
    "lists of lists": (b"[", b"[[1],[]],", b"[]]"),
    "deep lists": (b"[" * 10**5, b" ", b"]" * 10**5),
    "deep objects": (b'{"a":' * 10**5, b" ", b"1" + b"}" * 10**5),
    "long string": (b'"', b"x", b'"'),
    "wide string": ('"\N{GRINNING FACE}'.encode(), b"x", b'"'),
    "escapes": (b'"', rb"\u0061", b'"'),
    "halves": (b'"', rb"\ud800", b'"'),
    "json in a string": (b'"[', rb"\u0030\u002c", b'0]"'),
    "long number": (b"", b"1", b""),
    "long fraction": (b"0.", b"1", b""),
    "no UTF-8": (b'"', b"\xff", b'"'),
    "spaces": (b"", b" ", b"1"),
    "one name": (b"{", b'"a":1,', b'"a":1}'),
    "long name": (b'{"', b"k", b'":1}'),
    "messages": (b"[", b'{"role":"user","content":"x"},', b'{"role":"user","content":"x"}]'),
    "calls": (b'[{"role":"assistant","tool_calls":[', b'{"name":"f"},', b'{"name":"f"}]}]'),
    "parts": (b'[{"role":"user","content":[', b'{"type":"text","text":"x"},', b'"x"]}]'),
    "turns": (b"[", b'{"role":"assistant","content":"x"},{"type":"function_call","name":"f"},', b'{"role":"user"}]'),
    "tools": (b"[", b'{"type":"function","function":{"name":"f"}},', b"{}]"),
}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": (
        {"messages": HELLO, "max_tokens": 1},
        "messages messages.content tools stop logit_bias stop_token_ids response_format guided_json guided_choice"
        " guided_regex chat_template_kwargs tool_choice metadata documents seed model stream_options unknown"
        " reasoning_effort thinking n",
    ),
    "/v1/completions": ({"prompt": "a", "max_tokens": 1}, "prompt suffix stop logit_bias structured_outputs unknown"),
    "/generate": (
        {"text": "a", "sampling_params": {"max_tokens": 1}},
        "text input_ids sampling_params sampling_params.stop",
    ),
    "/tokenize": ({"prompt": "a"}, "prompt messages tools unknown"),
    "/detokenize": ({"tokens": [1]}, "tokens model unknown"),
    "/abort_request": ({"rid": "a"}, "rid abort_all unknown"),
    "/v1/responses": (
        {"input": "a", "max_output_tokens": 1},
        "input instructions tools metadata include text previous_response_id reasoning user unknown",
    ),
    "/v1/messages": (
        {"messages": HELLO, "max_tokens": 1},
        "messages messages.content system tools tool_choice stop_sequences metadata thinking unknown",
    ),
    "/v1/messages/count_tokens": ({"messages": HELLO}, "messages system"),
}


def body(path: str, field: str, kind: str, size: int) -> bytes:
    """A body of about so many bytes, whose field is of this kind."""
    base, _ = FIELDS[path]
    begin, unit, end = KINDS[kind]
    value = begin + unit * ((size - len(begin) - len(end)) // len(unit)) + end
    outer, _, inner = field.rpartition(".")
    raw = json.dumps({name: part for name, part in base.items() if name not in (field, outer)}).encode()[1:-1]
    name = json.dumps(inner or field).encode()
    if outer == "messages":
        value = b'[{"role": "user", %s: %s}]' % (name, value)
        name = b'"messages"'
    elif outer:
        value = b"{%s: %s}" % (name, value)
        name = json.dumps(outer).encode()
    return b"{%s%s: %s}" % (raw + b", " if raw else b"", name, value)


class Watch:
    """What a server's clients notice meanwhile, the slowest answer of /health; and what it costs, in bytes. An answer
    that comes late because others have the machine's cores is no fault of the server: of an answer's time that counts
    which its processes have computed."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self._processes = [psutil.Process(server.process.pid), *server.children]
        self._clocks = [~process.pid << 3 | 2 for process in self._processes]  # as clock_getcpuclockid numbers them
        self._slowest = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Watch:
        self._thread.start()
        time.sleep(0.5)
        self.idle, _ = self.take()  # on a machine that has other work to do, this is no small figure
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _poll(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self._stopped.wait(0.02):
                begin, computed = time.monotonic(), self.computed()
                assert http.get("/health").status_code == 200
                self._slowest = max(self._slowest, min(time.monotonic() - begin, self.computed() - computed))

    def computed(self) -> float:
        """Processor time of the server's processes, in seconds."""
        return sum(map(time.clock_gettime, self._clocks))

    def take(self) -> tuple[float, int]:
        """The slowest answer since the last look; and the most that the processes have held since then, together."""
        slowest, self._slowest = self._slowest, 0.0
        held = 0
        for process in self._processes:
            status = Path(f"/proc/{process.pid}/status").read_text()
            held += 1024 * int(status.partition("VmHWM:")[2].split()[0])
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        return slowest, held

    def check(self, path: str, data: bytes) -> httpx.Response:
        """The answer to a body. Raises: AssertionError when it costs too much."""
        self.take()
        _, before = self.take()
        answer = post(self.url + path, data)
        slowest, held = self.take()
        told = f"{path} {data[:80]!r}: {answer.status_code} {answer.text[:200]}"
        assert answer.status_code in (200, 400, 404, 413), told
        assert len(answer.content) < 4 * MIB, told
        assert held - before < 4 * len(data) + 64 * MIB, f"{(held - before) / MIB:.0f} MiB: {told}"
        assert slowest < 0.5 + 5 * self.idle, f"{slowest:.2f} s: {told}"
        return answer


def post(url: str, data: bytes) -> httpx.Response:
    parts = (data[first : first + 2**16] for first in range(0, len(data), 2**16))
    headers = {"content-type": "application/json", "content-length": str(len(data))}
    return httpx.post(url, content=parts, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def watch(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    log = tmp_path_factory.mktemp("logs") / "bodies.log"
    with Server.running(fake(model_path), log) as server, Watch(server) as made:
        yield made


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_of_every_body(watch: Watch, path: str) -> None:
    """Each field meets a third of the kinds, and the fields of a body all of them. Half a megabyte is few enough values
    for all of it to be read."""
    for index, field in enumerate(FIELDS[path][1].split()):
        for kind in [*KINDS][index % 3 :: 3]:
            watch.check(path, body(path, field, kind, MIB // 2))


@pytest.mark.parametrize(
    ("path", "field", "kind"),
    [
        ("/v1/completions", "prompt", "floats"),
        ("/v1/completions", "prompt", "long string"),
        ("/v1/chat/completions", "messages", "messages"),
        ("/v1/chat/completions", "tools", "halves"),
        ("/v1/chat/completions", "messages.content", "wide string"),
        ("/v1/responses", "metadata", "long name"),
        ("/v1/messages", "messages.content", "long number"),
        ("/generate", "input_ids", "ids"),
        ("/detokenize", "tokens", "lists"),
    ],
)
def test_64_megabytes(watch: Watch, path: str, field: str, kind: str) -> None:
    assert watch.check(path, body(path, field, kind, 64 * MIB - 100)).status_code in (400, 413)


def test_many_outputs_cost_what_one_does(watch: Watch) -> None:
    """A prompt is sent and tokenized once, however many outputs it is to have."""
    messages = [{"role": "user", "content": "x"}] * 1000
    costs = {}
    for n in (1, 16, 1, 16):
        watch.take()
        _, before = watch.take()
        begin = watch.computed()
        data = json.dumps({"messages": messages, "n": n, "max_tokens": 1}).encode()
        assert post(f"{watch.url}/v1/chat/completions", data).status_code == 400  # too long, as the tokenizer finds
        costs[n] = watch.computed() - begin, watch.take()[1] - before
    assert costs[16][0] < 3 * costs[1][0] + 0.5
    assert costs[16][1] < costs[1][1] + 32 * MIB


@pytest.mark.parametrize(
    "request_body",
    [
        {"messages": [{"role": "user", "content": "x"}] * 300_000, "n": 16},
        {"messages": [{"role": "user", "content": "x"}] * 20_000, "n": 128},
        {"prompt": [12345] * 4_000_000, "n": 128},
        {"prompt": [12345] * 400_000, "n": 128},
        {"prompt": ["x" * 2**20] * 8, "n": 128},
    ],
    ids=["300,000 messages", "20,000 messages", "24 MB of ids", "2.4 MB of ids", "8 MB of texts"],
)
def test_work_is_bounded_before_it_is_done(watch: Watch, request_body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in request_body else "/v1/completions"
    answer = watch.check(path, json.dumps(request_body).encode())
    assert answer.status_code in (400, 413)
    assert "at most" in answer.text or "more than" in answer.text or "context length" in answer.text


def test_too_little_memory_costs_one_request(start: Callable[..., Server], model_path: Path) -> None:
    server = start(fake(model_path))
    process = psutil.Process(server.process.pid)
    usual = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 80 * MIB, usual[1]))
    for kind in ("wide string", "long string", "ids"):
        try:
            answer = post(f"{server.url}/v1/completions", body("/v1/completions", "prompt", kind, 60 * MIB))
            assert answer.status_code in (400, 413, 503)
        except httpx.TransportError:
            pass  # where there is no memory to take it in, the connection ends
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    process.rlimit(psutil.RLIMIT_AS, usual)
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
