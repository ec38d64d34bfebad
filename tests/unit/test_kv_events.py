"""Events of a prefix cache: what whoever hears them all knows is what is in the tree."""

from __future__ import annotations

import random
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import zmq

from minisgl.config.args import parse_args
from minisgl.config.runtime import SchedulerConfig
from minisgl.errors import ConfigError
from minisgl.kvcache.radix import PrefixCache, RadixNode
from minisgl.scheduler.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    KvEvents,
    Publisher,
    publishers,
)
from minisgl.scheduler.planner import Planner

Text = tuple[bytes, tuple[int, ...]]  # a namespace, and the tokens of a prefix


class Index:
    """What a router makes of events: which prefixes there are."""

    def __init__(self) -> None:
        self.known: dict[int, Text] = {}

    def send(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    del self.known[block]
            elif isinstance(event, AllBlocksCleared):
                self.known = {}

    def _store(self, event: BlockStored) -> None:
        namespace, text = self.known[event.parent_block_hash] if event.parent_block_hash is not None else (b"", ())
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        for index, block in enumerate(event.block_hashes):
            assert block not in self.known, "a block is stored twice"
            text += tuple(event.token_ids[index * event.block_size : (index + 1) * event.block_size])
            self.known[block] = (namespace, text)

    @property
    def texts(self) -> list[tuple[int, ...]]:
        return sorted(text for _, text in self.known.values())


def texts_of(cache: PrefixCache, page_size: int) -> list[tuple[int, ...]]:
    found = []

    def walk(node: RadixNode, text: tuple[int, ...]) -> None:
        for page in range(len(node.pages)):
            found.append(text + tuple(node.key[: (page + 1) * page_size].tolist()))
        for child in node.children.values():
            walk(child, text + tuple(node.key.tolist()))

    walk(cache.nodes()[0], ())
    return sorted(found)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_events_tell_the_whole_tree(page_size: int, seed: int) -> None:
    rng, cache, index = random.Random(seed), PrefixCache(page_size), Index()
    planner = cast(Planner, SimpleNamespace(pages=SimpleNamespace(cache=cache)))
    events = KvEvents(cast(Publisher, index), page_size)
    free = list(range(400))
    insert(cache, free, page_size, b"", [1] * 3 * page_size)  # before anybody listens
    events.attached(planner, lambda: None)
    for _ in range(200):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 8) * page_size)]
        if rng.random() < 0.7:
            insert(cache, free, page_size, rng.choice((b"", b"salt")), tokens)
        else:
            free += cache.evict(rng.randrange(4))
        if rng.random() < 0.5:
            events.turned()
            assert index.texts == texts_of(cache, page_size)
    planner.pages.cache = other = PrefixCache(page_size)  # as after a fault
    insert(other, free, page_size, b"", [1] * 2 * page_size)
    events.turned()
    assert index.texts == texts_of(other, page_size)


def insert(cache: PrefixCache, free: list[int], page_size: int, namespace: bytes, tokens: list[int]) -> None:
    """As a request does that computes these tokens and ends."""
    ids = np.array(tokens, np.int32)
    match = cache.match(namespace, ids)
    cache.lock(match.handle)
    pages = match.pages + [free.pop() for _ in range(len(tokens) // page_size - len(match.pages))]
    cache.unlock(cache.insert(namespace, match.handle, ids, pages))


def test_hashes_are_chained_and_salted() -> None:
    index = Index()
    cache = PrefixCache(2)
    events = KvEvents(cast(Publisher, index), 2)
    events.attached(cast(Planner, SimpleNamespace(pages=SimpleNamespace(cache=cache))), lambda: None)
    free = list(range(20))
    for namespace, tokens in ((b"", [1, 2, 3, 4]), (b"s", [1, 2, 3, 4]), (b"", [3, 4])):
        insert(cache, free, 2, namespace, tokens)
        events.turned()
    assert len(index.known) == 5, "the same tokens behind others, or of another salt, are another block"


def test_published_as_vllm_publishes_and_again_for_who_has_missed_some() -> None:
    endpoints = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = Publisher(*endpoints, topic=b"kv")
    with context.socket(zmq.SUB) as heard, context.socket(zmq.DEALER) as asks:
        heard.setsockopt(zmq.SUBSCRIBE, b"kv")
        heard.connect(endpoints[0])
        asks.connect(endpoints[1])
        deadline = time.monotonic() + 20
        number = -1
        while not heard.poll(100):  # who comes late has missed some
            assert time.monotonic() < deadline
            publisher.send([BlockStored([7, 8], None, [1, 2, 3, 4], 2), BlockRemoved([7])])
            number += 1
        topic, counted, data = heard.recv_multipart()
        assert (topic, int.from_bytes(counted, "big")) == (b"kv", number)
        when, events, rank = msgspec.msgpack.decode(data)
        assert abs(when - time.time()) < 60
        assert events == [["BlockStored", [7, 8], None, [1, 2, 3, 4], 2, None, None, None], ["BlockRemoved", [7], None]]
        assert rank == 0
        asks.send_multipart((b"", (number).to_bytes(8, "big")))
        assert [part(asks) for _ in range(2)] == [(number, data), (2**64 - 1, b"")]
    context.term()


def part(asks: Any) -> tuple[int, bytes]:
    assert asks.poll(20_000)
    _, number, data = asks.recv_multipart()
    return int.from_bytes(number, "big"), data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:{}", "ipc:///nowhere/{}"])
def test_an_endpoint_that_cannot_be_had(endpoint: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = endpoint.format(holder.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--kv-events-endpoint {taken}: .*(Address already in use|No such file)"):
            Publisher(taken)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("127.0.0.1:5557", r"--kv-events-endpoint \['127.0.0.1:5557'\]: expected ZeroMQ endpoints such as tcp://"),
        ("tcp://*:1,tcp://*:2,tcp://*:3", "--kv-events-endpoint tcp://.*: expected one, or two"),
    ],
)
def test_what_is_no_endpoint(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        endpoints = parse_args(["--kv-events-endpoint", given]).kv_events_endpoint
        publishers(SchedulerConfig(1, 1, 1, 1, 1, kv_events_endpoint=endpoints))
