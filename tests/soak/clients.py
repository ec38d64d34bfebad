"""Clients that do at random what clients do: ask in every dialect, read slowly, leave, abort, send nonsense.

Each checks what comes back to it: one end for each output, of the right kind; an error that says when to come again;
never a 500. What they do is drawn from their seed; when it happens is not.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections import Counter
from random import Random
from typing import Any

import httpx

Json = dict[str, Any]

KEYS = ("soak-key-1", "soak-key-2")
ADMIN = "soak-admin"
MAX_SEQ_LEN = 512
PROMPTS = (
    "once upon a time ",
    "once upon a table ",
    "a b c d e f g h ",
    "xyz " * 20,
    "once upon a time there was " * 3,
)
ENDS = {"stop", "length", "tool_calls"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e300,
    2**70,
    "",
    "x" * 5000,
    "\x1b[31m\n",
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    "\ufeff",
)
BYTES = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"BREW /pot HTTP/9.9\r\nHost: x\r\n\r\n",
)
HALVES = (
    b"POST /v1/comple",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthor",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{",
)


class Client:
    """One of several that talk to the server at once.

    answers: of requests whose answer is certain, greedy ones and those with a seed: the same for all clients. counts:
    what was done, by kind, and each status by its number.
    """

    def __init__(self, url: str, seed: int, answers: dict[str, str]) -> None:
        self._random = Random(seed)
        self._key = self._random.choice(KEYS)
        headers = {"authorization": f"Bearer {self._key}"}
        self._http = httpx.Client(base_url=url, timeout=120, headers=headers)
        self._seed, self._answers, self._serial = seed, answers, 0
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        kinds = [self.whole, self.whole, self.stream, self.stream, self.chat, self.chat, self.responses, self.messages]
        kinds += [
            self.generate,
            self.grammar,
            self.tools,
            self.many,
            self.malformed,
            self.malformed,
            self.leave,
            self.leave,
        ]
        kinds += [self.time_out, self.abort, self.slow, self.raw, self.half, self.operations]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind = self._random.choice(kinds)
            kind()
            self.counts[kind.__name__] += 1

    def close(self) -> None:
        self._http.close()

    # --- what is asked, and what must come back

    def body(self) -> Json:
        body: Json = {"prompt": self._random.choice(PROMPTS), "max_tokens": self._random.choice([1, 7, 40])}
        body |= self._random.choice(
            [{"temperature": 0}, {"seed": 5}, {"seed": 5, "top_k": 7}, {"seed": 5, "top_p": 0.8}]
        )
        return body | self._random.choice([{}, {}, {"stop": ["e", "zz"]}, {"ignore_eos": True}])

    def extras(self) -> Json:
        """What changes no token."""
        return self._random.choice([{}, {"cache_salt": self._random.choice("abc")}, {"logprobs": 2}, {"user": "x"}])

    def messages_of(self) -> list[Json]:
        return [{"role": "user", "content": self._random.choice(PROMPTS)}]

    def said(self, answer: httpx.Response, *allowed: int) -> Json | None:
        """The answer, or None where the server may refuse: it says when to come again. Anything else is a failure."""
        self.counts[str(answer.status_code)] += 1
        if answer.status_code in (429, 503):
            assert int(answer.headers["retry-after"]) > 0, answer.text
            assert answer.json()["error"]["message"]
            return None
        assert answer.status_code in (allowed or (200,)), f"{answer.request.url}: {answer.status_code} {answer.text}"
        return dict(answer.json())

    def ask(self, path: str, body: Json, *allowed: int) -> Json | None:
        return self.said(self._http.post(path, json=body), *allowed)

    def events(self, path: str, body: Json, read: Any = None) -> list[Json] | None:
        """All events of a stream; None where it was refused. read: told of each."""
        events: list[Json] = []
        with self._http.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                answer.read()
                self.said(answer)
                return None
            self.counts["200"] += 1
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    events.append({"done": True} if data == "[DONE]" else json.loads(data))
                    if read is not None:
                        read(events[-1])
        return events

    def one_end(self, events: list[Json], num_choices: int, *more: str) -> str | None:
        """Each choice of a stream ends once, or the stream ends with one error. Returns the text of the first."""
        errors = [event for event in events if "error" in event]
        ends: Counter[int] = Counter()
        text = ""
        for event in events:
            for choice in event.get("choices", ()):
                assert not ends[choice["index"]] or not choice["finish_reason"], events
                ends[choice["index"]] += choice["finish_reason"] is not None
                assert choice["finish_reason"] in (None, *ENDS, *more)
                text += (choice.get("text") or "") if choice["index"] == 0 else ""
        assert all(count == 1 for count in ends.values() if count)
        if errors:
            assert len(errors) == 1
            assert {"error"} & events[-1].keys() or (events[-1] == {"done": True} and "error" in events[-2]), events[
                -3:
            ]
            self.counts["error event"] += 1
            return None
        assert events[-1] == {"done": True}
        assert sum(ends.values()) == num_choices, (ends, num_choices)
        return text

    def check(self, body: Json, text: str) -> None:
        """The same text for the same request, whatever else was running, and whichever worker has died."""
        assert not any(stop in text for stop in body.get("stop", ()))
        assert self._answers.setdefault(json.dumps(body), text) == text

    # --- kinds of requests

    def whole(self) -> None:
        body = self.body()
        said = self.ask("/v1/completions", {**body, **self.extras()})
        if said is not None:
            (choice,) = said["choices"]
            num_tokens = said["usage"]["completion_tokens"]
            assert choice["finish_reason"] in ENDS
            assert 1 <= num_tokens <= body["max_tokens"]
            assert choice["finish_reason"] == "stop" or num_tokens == body["max_tokens"]
            self.check(body, choice["text"])

    def stream(self) -> None:
        body = self.body()
        events = self.events("/v1/completions", {**body, **self.extras()})
        text = None if events is None else self.one_end(events, 1)
        if text is not None:
            self.check(body, text)

    def chat(self) -> None:
        n = self._random.choice([1, 1, 3])
        body = {"messages": self.messages_of(), "max_tokens": self._random.randint(1, 60), "n": n}
        body |= self._random.choice(
            [{}, {"logprobs": True, "top_logprobs": 20}, {"stop": ["a" * 50]}, {"presence_penalty": 1}]
        )
        if self._random.random() < 0.5:
            said = self.ask("/v1/chat/completions", body)
            assert said is None or [choice["finish_reason"] in ENDS for choice in said["choices"]] == [True] * n
        elif (events := self.events("/v1/chat/completions", body)) is not None:
            self.one_end(events, n)

    def responses(self) -> None:
        body = {"input": self._random.choice(PROMPTS), "max_output_tokens": self._random.randint(1, 40)}
        said = self.ask("/v1/responses", body)
        if said is None:
            return
        assert said["status"] in ("completed", "incomplete")
        again = {**body, "previous_response_id": said["id"]}
        if (events := self.events("/v1/responses", again)) is not None:
            kinds = [event.get("type") for event in events if event != {"done": True}]
            last = {"response.completed", "response.incomplete", "response.failed", "error"}
            assert sum(kind in last - {"error"} for kind in kinds) <= 1
            assert kinds[-1] in last, kinds[-3:]

    def messages(self) -> None:
        body = {"messages": self.messages_of(), "max_tokens": self._random.randint(1, 40), "model": "tiny"}
        if self._random.random() < 0.5:
            answer = self._http.post("/v1/messages", json=body)
            said = self.said(answer)
            assert said is None or said["stop_reason"] in ("end_turn", "max_tokens", "stop_sequence")
        elif (events := self.events("/v1/messages", body)) is not None:
            kinds = [event["type"] for event in events]
            assert kinds[-1] in ("message_stop", "error")
            assert kinds.count("message_stop") + kinds.count("error") == 1

    def generate(self) -> None:
        body = {"text": self._random.choice(PROMPTS), "sampling_params": {"max_new_tokens": 9, "temperature": 0}}
        said = self.ask("/generate", body)
        assert said is None or said["text"] is not None

    def grammar(self) -> None:
        number = self._random.randint(1, 30)
        pattern = f"[0-9]{{{number}}}[a-f]?"
        kind: Json = self._random.choice(
            [
                {"structured_outputs": {"regex": pattern}},
                {"structured_outputs": {"choice": ["left", f"right {number}"]}},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            ]
        )
        body = {"messages": self.messages_of(), "max_tokens": 80, **kind}
        said = self.ask("/v1/chat/completions", body)
        if said is not None and said["choices"][0]["finish_reason"] == "stop":
            text = said["choices"][0]["message"]["content"]
            if "response_format" in kind:
                assert json.loads(text).keys() == {"a", "b"}
            elif "regex" in kind["structured_outputs"]:
                assert re.fullmatch(pattern, text)
            else:
                assert text in ("left", f"right {number}")

    def tools(self) -> None:
        body = {"messages": self.messages_of(), "max_tokens": 90, "tools": [TOOL], "tool_choice": "required"}
        if self._random.random() < 0.5:
            said = self.ask("/v1/chat/completions", body)
            if said is not None and said["choices"][0]["finish_reason"] == "tool_calls":
                assert said["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
        elif (events := self.events("/v1/chat/completions", body)) is not None:
            self.one_end(events, 1)

    def many(self) -> None:
        """A large `n`, or several prompts."""
        one = {"prompt": self._random.choice(PROMPTS), "n": 32, "max_tokens": 3}
        several = {"prompt": [*PROMPTS], "n": 4, "max_tokens": 3, "logprobs": 20}
        said = self.ask("/v1/completions", self._random.choice([one, several]))
        assert said is None or [c["finish_reason"] in ENDS for c in said["choices"]] in ([True] * 32, [True] * 20)

    def malformed(self) -> None:
        path, body = self._random.choice(
            [
                ("/v1/completions", self.body()),
                ("/v1/chat/completions", {"messages": self.messages_of(), "max_tokens": 3, "tools": [TOOL], "n": 1}),
                ("/v1/responses", {"input": "a", "max_output_tokens": 3, "tools": [], "text": {}}),
                ("/v1/messages", {"messages": self.messages_of(), "max_tokens": 3, "system": "a"}),
                ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 3}}),
                ("/tokenize", {"prompt": "a"}),
                ("/detokenize", {"tokens": [5]}),
            ]
        )
        name = self._random.choice([*body, "stop", "seed", "response_format", "logit_bias", "cache_salt", "stream"])
        body = {**body, name: self._random.choice(JUNK)}
        answer = self._http.post(path, json=body)
        self.said_badly(answer)
        if self._random.random() < 0.3:
            data = json.dumps(body).encode()
            cut = data[: self._random.randrange(len(data))]
            self.said_badly(self._http.post(path, content=cut, headers={"content-type": "application/json"}))

    def said_badly(self, answer: httpx.Response) -> None:
        """A body that may be wrong is answered, refused, or put off."""
        self.counts[str(answer.status_code)] += 1
        assert answer.status_code in (200, 400, 404, 413, 415, 429, 503), (
            f"{answer.request.content[:300]!r}: {answer.text}"
        )

    # --- what clients do to servers

    def leave(self) -> None:
        """Go away after the first events."""
        body = {"messages": self.messages_of(), "n": 2, "max_tokens": 60, "stream": True}
        with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            for _ in zip(range(self._random.randint(0, 6)), answer.iter_lines(), strict=False):
                pass

    def time_out(self) -> None:
        """Go away while a whole answer is made."""
        body = {"messages": self.messages_of(), "n": 2, "max_tokens": 60, "ignore_eos": True}
        with contextlib.suppress(httpx.TimeoutException):
            self._http.post("/v1/chat/completions", json=body, timeout=self._random.uniform(0.001, 0.3))

    def abort(self) -> None:
        self._serial += 1
        rid = f"soak-{self._seed}-{self._serial}"
        seen: list[Json] = []

        def read(event: Json) -> None:
            seen.append(event)
            if len(seen) == 2:
                self.ask("/abort_request", {"rid": rid})

        body = {"prompt": "a b c", "max_tokens": 120, "ignore_eos": True, "n": 2}
        self._http.headers["x-request-id"] = rid
        try:
            events = self.events("/v1/completions", body, read)
        finally:
            del self._http.headers["x-request-id"]
        if events is not None:
            self.one_end(events, 2, "abort")

    def slow(self) -> None:
        """Read a large answer a little at a time, to its end or not."""
        body = {"prompt": "a b c", "max_tokens": 100, "ignore_eos": True, "n": 4, "logprobs": 20, "stream": True}
        with self.connection(receive=4096) as connection:
            connection.sendall(self.request("/v1/completions", body))
            for _ in range(self._random.randint(1, 8)):
                connection.recv(2000)
                time.sleep(self._random.uniform(0.05, 0.4))
            if self._random.random() < 0.5:
                with contextlib.suppress(ConnectionResetError, TimeoutError):
                    while connection.recv(1 << 20):
                        pass

    def raw(self) -> None:
        with self.connection() as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(self._random.choice(BYTES))
            status = connection.recv(65536).partition(b"\r\n")[0]
            assert not status or re.match(rb"HTTP/1\.1 (200|4\d\d|503) ", status), status

    def half(self) -> None:
        with self.connection() as connection:
            connection.sendall(self._random.choice(HALVES))
            time.sleep(self._random.uniform(0, 0.5))

    def operations(self) -> None:
        for path in self._random.sample(
            ["/v1/models", "/version", "/health/live", "/nope", "/metrics", "/openapi.json"], 3
        ):
            answer = self._http.get(path)
            assert answer.status_code == {"/nope": 404, "/metrics": 403}.get(path, 200), path
        admin = {"authorization": f"Bearer {ADMIN}"}
        self.said(self._http.post("/flush_cache", headers=admin))
        said = self.ask("/tokenize", {"prompt": "a b c"})
        if said is not None:
            self.ask("/detokenize", {"tokens": said["tokens"]})

    def connection(self, receive: int | None = None) -> socket.socket:
        made = socket.socket()
        if receive is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        made.settimeout(120)
        made.connect((self._http.base_url.host, self._http.base_url.port))
        return made

    def request(self, path: str, body: Json) -> bytes:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self._key}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
