"""What becomes of a prefix cache, for routers: events in the form of vLLM's, which Dynamo's and llm-d's routers read.

A block is a page. Its hash is of its tokens, of the block before it and, in the first one, of the namespace. Batches of
events go out by a ZeroMQ PUB socket as `topic, number, batch`, numbered in turn with eight bytes (big-endian). Whoever
has missed some asks the ROUTER socket for all from a number on, and gets those that are still there and a last one, -1.
"""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from minisgl.config.runtime import SchedulerConfig
from minisgl.errors import ConfigError
from minisgl.kvcache.radix import Change, RadixNode
from minisgl.scheduler.observer import Observer
from minisgl.scheduler.planner import Planner

REPLAYED = 10_000  # batches that are kept
END = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, array_like=True, tag=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True):
    pass


Event = BlockStored | BlockRemoved | AllBlocksCleared  # arrays, as their names and then these fields


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Event]
    data_parallel_rank: int | None = 0


_encode = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(EventBatch).decode


class Publisher:
    """Sends batches, and those of late again to whoever asks; a thread does so, also while the scheduler waits.

    events, replay: the endpoints, which are bound here; without the second nothing is sent again. Raises: ConfigError.
    """

    def __init__(self, events: str, replay: str = "", *, topic: bytes = b"") -> None:
        self._topic, context = topic, zmq.Context[zmq.Socket[bytes]].instance()
        sockets = [context.socket(kind) for kind in (zmq.PUB, zmq.ROUTER, zmq.PULL)]
        sockets[1].setsockopt(zmq.SNDHWM, 0)  # it would drop what does not fit without a word, the end mark too
        for socket, endpoint in zip(sockets, (events, replay, where := f"inproc://events-{id(self)}"), strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            try:
                if endpoint:
                    socket.bind(endpoint)
            except zmq.ZMQError as error:
                for one in sockets:
                    one.close()
                raise ConfigError(f"--kv-events-endpoint {endpoint}: {error.strerror or error}") from None
        self._batches = context.socket(zmq.PUSH)
        self._batches.connect(where)
        threading.Thread(target=self._run, args=sockets, name="minisgl-events", daemon=True).start()

    def send(self, events: list[Event]) -> None:
        self._batches.send(_encode(EventBatch(time.time(), events)))

    def _run(self, events: zmq.Socket[bytes], replay: zmq.Socket[bytes], batches: zmq.Socket[bytes]) -> None:
        sent = deque[tuple[bytes, bytes]](maxlen=REPLAYED if replay.getsockopt(zmq.LAST_ENDPOINT) else 1)
        poller, number = zmq.Poller(), 0
        for socket in (replay, batches):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if replay in ready:
                who, *_, first = replay.recv_multipart()
                for batch in (*(batch for batch in sent if batch[0] >= first), (END, b"")):
                    replay.send_multipart((who, b"", *batch))
            if batches in ready:
                sent.append((number.to_bytes(8, "big"), batches.recv()))
                events.send_multipart((self._topic, *sent[-1]))
                number += 1


class KvEvents(Observer):
    """Turns what the prefix cache notes into events, once a turn of the scheduler."""

    def __init__(self, publisher: Publisher, page_size: int) -> None:
        self._publisher, self._page_size = publisher, page_size
        self._planner: Planner | None = None
        self._changes: deque[Change] = deque()
        self._hashes: dict[int, int] = {}  # of each page that the cache has

    def attached(self, planner: Planner, pump: Callable[[], None]) -> None:  # noqa: ARG002
        self._planner = planner

    def turned(self) -> None:
        assert self._planner is not None
        cache, events = self._planner.pages.cache, list[Event]()
        if cache.changes is not self._changes:  # the planner has begun, perhaps anew
            self._changes = cache.changes = deque(map(_change, cache.nodes()[1:]))
            self._hashes = {}
            events.append(AllBlocksCleared())
        while self._changes:
            events.append(self._event(self._changes.popleft()))
        if events:
            self._publisher.send(events)

    def _event(self, change: Change) -> Event:
        pages, token_ids, before, namespace = change
        if token_ids is None:
            return BlockRemoved([self._hashes.pop(page) for page in pages])
        parent = None if before is None else self._hashes[before]
        size, last, hashes = self._page_size, parent, list[int]()
        for index, page in enumerate(pages):
            head = namespace if last is None else last.to_bytes(8, "big")
            tokens = token_ids[index * size : (index + 1) * size].tobytes()
            last = int.from_bytes(hashlib.blake2b(tokens + head, digest_size=8).digest(), "big")
            self._hashes[page] = last
            hashes.append(last)
        return BlockStored(hashes, parent, token_ids.tolist(), size)


def _change(node: RadixNode) -> Change:
    """The one by which the cache got the pages of a node."""
    before = node.parent.pages[-1:] if node.parent is not None else []
    page = len(node.key) // len(node.pages)
    namespace = b"" if before else node.name[node.key[:page].nbytes :]
    return node.pages, node.key, before[0] if before else None, namespace


def publishers(config: SchedulerConfig) -> list[Observer]:
    """Who publishes the events of rank 0's scheduler, if that is asked for. Raises: ConfigError."""
    if not config.kv_events_endpoint:
        return []
    if len(config.kv_events_endpoint) > 2:
        raise ConfigError(f"--kv-events-endpoint {','.join(config.kv_events_endpoint)}: expected one, or two")
    return [KvEvents(Publisher(*config.kv_events_endpoint), config.page_size)]
