"""Thousands of clients on raw sockets, cheap enough to share two cores with the server that they press."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Answer:
    """status: 0 when the connection ended without one. seconds: until the head, the first body bytes, and the end."""

    status: int = 0
    head: bytes = b""
    body: bytes = b""
    began: float = 0.0
    first: float = 0.0
    seconds: float = 0.0

    def header(self, name: str) -> str | None:
        found = re.search(rb"\r\n" + name.encode() + rb": *([^\r]*)", self.head, re.IGNORECASE)
        return found[1].decode() if found else None


def raise_descriptor_limit(count: int) -> None:
    """For so many sockets in this process, and in servers that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count), hard))


def post(path: str, body: dict[str, Any], **headers: str) -> bytes:
    """The bytes of a request."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(data)}",
    ]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


class _Reader(asyncio.Protocol):
    """Reads one answer at a time."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.begin = 0.0
        self.done: asyncio.Future[Answer] | None = None
        self.closed = False
        self._size: int | None = None

    def expect(self) -> asyncio.Future[Answer]:
        self.answer, self._size, self.begin = Answer(), None, time.perf_counter()
        self.done = asyncio.get_running_loop().create_future()
        if self.closed:
            self._finish()
        return self.done

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        answer.body += data
        if not answer.head:
            head, found, rest = answer.body.partition(b"\r\n\r\n")
            if not found:
                return
            answer.head, answer.body, answer.status = head, rest, int(head[9:12])
            answer.began = time.perf_counter() - self.begin
            sized = _LENGTH.search(head)
            self._size = int(sized[1]) if sized else None
        if answer.body and not answer.first:
            answer.first = time.perf_counter() - self.begin
        if len(answer.body) >= self._size if self._size is not None else answer.body.endswith(b"0\r\n\r\n"):
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._finish()

    def _finish(self) -> None:
        if self.done is not None and not self.done.done():
            self.answer.seconds = time.perf_counter() - self.begin
            self.done.set_result(self.answer)


class Client:
    """One connection, from an address of its own (127.x.y.z) if one is given."""

    def __init__(self, url: str, address: str | None = None) -> None:
        parts = urlsplit(url)
        self._where = parts.hostname, parts.port
        self._local = (address, 0) if address else None
        self._transport: asyncio.Transport | None = None
        self._reader = _Reader()

    async def send(self, request: bytes) -> Answer:
        if self._transport is None or self._reader.closed:
            loop = asyncio.get_running_loop()
            try:
                made = await loop.create_connection(_Reader, *self._where, local_addr=self._local)
            except OSError:
                return Answer()
            self._transport, self._reader = made
        done = self._reader.expect()
        self._transport.write(request)
        return await done

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            await asyncio.sleep(0)  # for the socket to be closed


async def ask(url: str, request: bytes, address: str | None = None) -> Answer:
    """On a connection of its own."""
    client = Client(url, address)
    try:
        return await client.send(request)
    finally:
        await client.close()


@dataclass
class Probe:
    """Asks again and again while something else goes on, and keeps the answers."""

    url: str
    request: bytes
    pause: float
    address: str | None = None
    answers: list[Answer] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            self.answers.append(await ask(self.url, self.request, self.address))
            await asyncio.sleep(self.pause)

    def percentile(self, share: float, of: str = "seconds") -> float:
        values = sorted(getattr(answer, of) for answer in self.answers)
        return float(values[min(len(values) - 1, int(share * len(values)))])


def statuses(answers: Sequence[Answer]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


class Memory:
    """Resident bytes of a process and its children: the most that was seen of each, by its title."""

    def __init__(self, pid: int) -> None:
        parent = psutil.Process(pid)
        self._processes = {"server": parent}
        self._processes |= {" ".join(child.cmdline()).strip()[:40]: child for child in parent.children(recursive=True)}
        self.most = dict.fromkeys(self._processes, 0)
        self.before = self.now()

    def now(self) -> dict[str, int]:
        sizes = {name: process.memory_info().rss for name, process in self._processes.items() if process.is_running()}
        for name, size in sizes.items():
            self.most[name] = max(self.most[name], size)
        return sizes

    async def watch(self) -> None:
        while True:
            self.now()
            await asyncio.sleep(0.25)
