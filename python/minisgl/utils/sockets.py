"""ZeroMQ sockets that carry one channel's messages: PULL binds, PUSH connects, a batch of structs per frame."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import zmq
import zmq.asyncio

T = TypeVar("T")

_MAX_TEMPDIR_LEN = 70  # the path of a Unix socket ends at some 107 bytes


def make_socket_directory() -> str:
    """A new directory for one server's sockets that nobody else may enter (0700). The caller removes it."""
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="minisgl-", dir=parent if len(parent) <= _MAX_TEMPDIR_LEN else "/tmp")


class MessageCodec(Protocol[T]):
    """Encodes and decodes batches of messages (`minisgl.message.codec.Codec`)."""

    def encode(self, messages: Sequence[T]) -> bytes: ...

    def decode(self, data: bytes) -> list[T]: ...


class PullSocket(Generic[T]):
    """Receives at an endpoint that this process binds. Never loses a message: the high-water mark is off."""

    def __init__(self, endpoint: str, codec: MessageCodec[T]) -> None:
        self._codec = codec
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(endpoint)

    def receive(self, timeout: float | None = None) -> list[T]:
        """All messages that are there, waiting up to `timeout` seconds (None: for ever) for the first."""
        if not self._socket.poll(None if timeout is None else int(timeout * 1000)):
            return []
        messages: list[T] = []
        while True:
            try:
                messages += self._codec.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return messages

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncPullSocket(Generic[T]):
    """The same for asyncio."""

    def __init__(self, endpoint: str, codec: MessageCodec[T]) -> None:
        self._codec = codec
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(endpoint)

    async def receive(self) -> list[T]:
        return self._codec.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=0)


class PushSocket(Generic[T]):
    """Sends to an endpoint that another process binds, before or after. `send` never blocks."""

    def __init__(self, endpoint: str, codec: MessageCodec[T]) -> None:
        self._codec = codec
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.connect(endpoint)

    def send(self, messages: Sequence[T]) -> None:
        if messages:
            self._socket.send(self._codec.encode(messages))

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)
