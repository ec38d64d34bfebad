"""Large bodies, and bodies that are wrong a million times: whatever they hold, and wherever, the answer has a bounded
price, and nobody else waits for it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import psutil

from tests.faults.conftest import Server

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
    """What a server's clients notice meanwhile: the slowest answer of /health; and what it costs, in bytes."""

    def __init__(self, server: Server) -> None:
        self._url = server.url
        self._processes = [psutil.Process(server.process.pid), *server.children]
        self._slowest = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Watch:
        self._thread.start()
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _poll(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._stopped.wait(0.02):
                begin = time.monotonic()
                assert http.get("/health").status_code == 200
                self._slowest = max(self._slowest, time.monotonic() - begin)

    def take(self) -> tuple[float, int]:
        """The slowest answer since the last look, and by how many bytes the server's processes have grown at most."""
        slowest, self._slowest = self._slowest, 0.0
        grown = 0
        for process in self._processes:
            status = dict(line.split(":", 1) for line in read(process, "status").splitlines())
            grown += 1024 * int(status["VmHWM"].split()[0])
            with open(f"/proc/{process.pid}/clear_refs", "w") as file:
                file.write("5")
        return slowest, grown


def read(process: psutil.Process, name: str) -> str:
    with open(f"/proc/{process.pid}/{name}") as file:
        return file.read()


def post(server: Server, path: str, data: bytes) -> httpx.Response:
    parts = (data[first : first + 2**16] for first in range(0, len(data), 2**16))
    headers = {"content-type": "application/json", "content-length": str(len(data))}
    return httpx.post(server.url + path, content=parts, headers=headers, timeout=120)
