"""What a router of another project hears of a server's prefix cache: ZeroMQ, and a decoder made from the published
layout of vLLM's events alone. No field of it has a default, so that each must be there."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest
import zmq

from tests.e2e.conftest import Server

END = (-1).to_bytes(8, "big", signed=True)
PAGE = 16


class Stored(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class Removed(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None


class Cleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None


class Subscriber:
    """known: the tokens of each block that is stored, from the beginning of its prompt on, by the block's hash."""

    def __init__(self, events: zmq.Socket[bytes], replay: zmq.Socket[bytes]) -> None:
        self.known: dict[int, list[int]] = {}
        self.number = -1  # of the last batch
        self._events, self._replay = events, replay
        self._decode = msgspec.msgpack.Decoder(Batch).decode

    def hear(self, seconds: float) -> bool:
        """The next batch; whether there is one. What is missing before it is asked for."""
        if not self._events.poll(seconds * 1000):
            return False
        topic, counted, data = self._events.recv_multipart()
        number = int.from_bytes(counted, "big")
        assert topic == b""
        if number > self.number + 1:
            for missed, again in self.replayed(self.number + 1):
                if missed < number:
                    self._take(again)
        self.number = number
        self._take(data)
        return True

    def replayed(self, first: int) -> list[tuple[int, bytes]]:
        self._replay.send_multipart((b"", first.to_bytes(8, "big")))
        batches = list[tuple[int, bytes]]()
        while True:
            assert self._replay.poll(60_000)
            _, number, data = self._replay.recv_multipart()
            if number == END:
                assert data == b""
                return batches
            batches.append((int.from_bytes(number, "big"), data))

    def _take(self, data: bytes) -> None:
        batch = self._decode(data)
        assert abs(batch.ts - time.time()) < 3600
        for event in batch.events:
            if isinstance(event, Cleared):
                self.known.clear()
            elif isinstance(event, Removed):
                for block in event.block_hashes:
                    del self.known[block]
            else:
                assert event.block_size == PAGE
                assert len(event.token_ids) == PAGE * len(event.block_hashes)
                before = [] if event.parent_block_hash is None else self.known[event.parent_block_hash]
                for end, block in enumerate(event.block_hashes, 1):
                    self.known[block] = before + event.token_ids[: end * PAGE]


@pytest.fixture
def subscriber(server: Server) -> Iterator[Subscriber]:
    endpoints = [f"ipc://{server.log.parent}/{name}" for name in ("events", "replay")]
    with zmq.Context() as context, context.socket(zmq.SUB) as events, context.socket(zmq.DEALER) as replay:
        for socket, endpoint in zip((events, replay), endpoints, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
        events.setsockopt(zmq.SUBSCRIBE, b"")
        yield Subscriber(events, replay)


def test_a_subscriber_knows_what_is_cached(subscriber: Subscriber, http: httpx.Client) -> None:
    """It comes late, so it has missed some; it hears of blocks that are stored, chained, and of those removed."""

    def complete(prompt: list[int]) -> int:
        body = {"prompt": prompt, "max_tokens": 1}
        usage = http.post("/v1/completions", json=body).raise_for_status().json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    def hear_of(prompt: list[int]) -> None:
        deadline = time.monotonic() + 60
        while prompt not in subscriber.known.values():
            subscriber.hear(0.5)
            assert time.monotonic() < deadline

    first = [7] * 2 * PAGE
    number = 0
    while not subscriber.hear(0.2):  # a subscription takes its time
        number += 1
        complete([number] * PAGE)
    complete([*first, 1])
    hear_of(first)
    longer = [*first, *range(20, 20 + PAGE)]
    complete([*longer, 1])
    hear_of(longer)
    assert complete([*longer, 2]) == len(longer), "and it is"
    assert [index for index, _ in subscriber.replayed(0)] == [*range(subscriber.number + 1)]
    assert http.post("/flush_cache").status_code == 200
    while subscriber.known:
        assert subscriber.hear(60), "nobody has told that the cache is empty"
    complete([*first, 1])
    hear_of(first)
    assert sorted(map(len, subscriber.known.values())) == [PAGE, 2 * PAGE]
