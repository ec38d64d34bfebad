"""Answers of vectors, which may be long, are made beside the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

from minisgl.config.pooling import Pooling
from minisgl.core import SamplingParams
from minisgl.message.messages import TextPrompt, UserReply
from minisgl.server.answers.delivery import answer_request
from minisgl.server.answers.renderer import Assembler
from minisgl.server.bodies.fields import Reading
from minisgl.server.routes.vectors import VectorRenderer, VectorRequest, parse_embeddings

VECTOR = np.array([0.1, -2.5, 3e-9], "<f4")


class Replies:
    """A stream of one reply."""

    def __init__(self) -> None:
        self.outputs, self._left = [None], [(0, UserReply(1, "", b"", 2, 0, 0, pooled=VECTOR.tobytes()))]

    def __aiter__(self) -> Replies:
        return self

    async def __anext__(self) -> tuple[int, UserReply]:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


def test_vectors_are_written_beside_the_event_loop() -> None:
    threads: list[threading.Thread] = []
    model: Any = SimpleNamespace(pooling=Pooling("last", False, ""), hidden_size=3)
    config: Any = SimpleNamespace(engine=SimpleNamespace(model=model), scheduler=SimpleNamespace(max_seq_len=8))
    parsed = parse_embeddings(config, b'{"input": "a", "encoding_format": "float"}', {}, Reading())

    def show(vectors: Any) -> Any:
        threads.append(threading.current_thread())
        return parsed.show(vectors)

    async def never() -> Any:
        await asyncio.Event().wait()

    state = SimpleNamespace(place=SimpleNamespace(take=print, begin=print, client=""), owner="", request_id="x")
    request: Any = SimpleNamespace(state=state, headers={}, receive=never)
    frontend: Any = SimpleNamespace(submit=lambda *_, **__: Replies())
    asked = VectorRequest((TextPrompt("a"),), SamplingParams(), show=show)
    renderer = VectorRenderer("m", asked, Assembler)
    answer = asyncio.run(answer_request(frontend, request, asked, renderer, 0))
    assert threads and threads[0] is not threading.main_thread()
    (shown,) = json.loads(bytes(answer.body))["data"]
    assert np.array(shown["embedding"], "<f4").tobytes() == VECTOR.tobytes()
