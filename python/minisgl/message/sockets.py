"""ZeroMQ sockets that carry one channel's messages, a batch in each frame, and where they are: PULL binds."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import zmq
import zmq.asyncio

from minisgl.errors import EngineError
from minisgl.message.messages import Codec

logger = logging.getLogger(__name__)
T = TypeVar("T")

DETOKENIZER = "detokenizer-0"  # the name of its process
MAX_FRAME_BYTES = 1 << 30  # what is larger ends the connection of who sends it


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the processes of one server receive: each binds a PULL socket at its own, others connect PUSH sockets."""

    backend: str  # rank 0's scheduler
    frontend: str  # the API server
    detokenizer: str
    tokenizers: Mapping[str, str]  # who tokenizes: processes of their own by name, or the detokenizer's
    ranks: tuple[str, ...]  # those above 0: the message batches that rank 0 numbers
    rendezvous: str  # beginning of a URL at which `torch.distributed` ranks find each other, once


def ipc_endpoints(directory: str, num_tokenizer: int = 0, tp_size: int = 1) -> Endpoints:
    """Of processes of this machine, inside of a directory of theirs: no port that can be taken by someone else."""
    names, base = [f"tokenizer-{index}" for index in range(num_tokenizer)] or [DETOKENIZER], f"ipc://{directory}"
    ranks = tuple(f"{base}/rank-{rank}" for rank in range(1, tp_size))
    tokenizers, rendezvous = {name: f"{base}/{name}" for name in names}, f"file://{directory}/rendezvous"
    return Endpoints(f"{base}/backend", f"{base}/frontend", f"{base}/{DETOKENIZER}", tokenizers, ranks, rendezvous)


class _Inbox(Generic[T]):
    """Receives at an endpoint that this process binds. Never loses a message: the high-water mark is off.

    A frame that is no message is dropped, and the log says so; where it is `strict`, it is an EngineError."""

    _context: Any = zmq.Context

    def __init__(self, endpoint: str, codec: Codec[T], *, strict: bool = False) -> None:
        self._codec, self._endpoint, self._strict, self._num_dropped = codec, endpoint, strict, 0
        self._socket: Any = self._context.instance().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.bind(endpoint)

    def close(self) -> None:
        self._socket.close(linger=0)

    def _decode(self, frame: bytes) -> list[T]:
        try:
            return self._codec.decode(frame)
        except Exception as error:
            told = f"{len(frame)} bytes at {self._endpoint} are no message ({type(error).__name__})"
            if self._strict or isinstance(error, MemoryError):  # then they may be one that somebody waits for
                raise EngineError(told) from error
        self._num_dropped += 1
        if self._num_dropped & (self._num_dropped - 1) == 0:  # the first, second, fourth, eighth …
            logger.error("dropped: %s; %d so far", told, self._num_dropped)
        return []


class PullSocket(_Inbox[T]):
    def receive(self, timeout: float | None = None) -> list[T]:
        """All messages that are there, waiting up to `timeout` seconds (None: for ever) for the first."""
        if not self._socket.poll(None if timeout is None else int(timeout * 1000)):
            return []
        messages: list[T] = []
        while True:
            try:
                messages += self._decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return messages


class AsyncPullSocket(_Inbox[T]):
    _context = zmq.asyncio.Context

    async def receive(self) -> list[T]:
        return self._decode(await self._socket.recv())


class PushSocket(Generic[T]):
    """Sends to an endpoint that another process binds, before or after. `send` never blocks."""

    def __init__(self, endpoint: str, codec: Codec[T]) -> None:
        self._codec = codec
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.connect(endpoint)

    def send(self, messages: Sequence[T]) -> None:
        if messages:
            self._socket.send(self._codec.encode(messages))

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)
