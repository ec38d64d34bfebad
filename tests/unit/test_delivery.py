"""Answers that may be long are made beside the event loop."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from minisgl.config.pooling import Pooling
from minisgl.core import FinishReason
from minisgl.message.messages import TokenLogprob, TopLogprob, UserReply, pack_ids
from minisgl.server.answers.delivery import MANY_REPLIES, answer_request
from minisgl.server.answers.openai import ChatRenderer
from minisgl.server.answers.renderer import Assembler, Renderer
from minisgl.server.bodies.chat import parse_chat
from minisgl.server.bodies.fields import Reading
from minisgl.server.routes.vectors import VectorRenderer, parse_embeddings

VECTOR = np.array([0.1, -2.5, 3e-9], "<f4")


class Replies:
    """A stream of these replies to one output."""

    def __init__(self, replies: Sequence[UserReply]) -> None:
        self.outputs, self._left = [None], [*replies]

    def __aiter__(self) -> Replies:
        return self

    async def __anext__(self) -> tuple[int, UserReply]:
        if not self._left:
            raise StopAsyncIteration
        return 0, self._left.pop(0)


def answer(asked: Any, renderer: Renderer, replies: Sequence[UserReply]) -> Any:
    """The body of the answer to a request that is replied to so."""

    async def never() -> Any:
        await asyncio.Event().wait()

    state = SimpleNamespace(place=SimpleNamespace(take=print, begin=print, client=""), owner="", request_id="x")
    request: Any = SimpleNamespace(state=state, headers={}, receive=never)
    frontend: Any = SimpleNamespace(submit=lambda *_, **__: Replies(replies))
    made = asyncio.run(answer_request(frontend, request, asked, renderer, 0))
    return json.loads(bytes(made.body))


def test_vectors_are_written_beside_the_event_loop() -> None:
    threads: list[threading.Thread] = []
    model: Any = SimpleNamespace(pooling=Pooling("last", False, ""), hidden_size=3)
    config: Any = SimpleNamespace(engine=SimpleNamespace(model=model), scheduler=SimpleNamespace(max_seq_len=8))
    parsed = parse_embeddings(config, b'{"input": "a", "encoding_format": "float"}', {}, Reading())

    def show(vectors: Any) -> Any:
        threads.append(threading.current_thread())
        return parsed.show(vectors)

    asked = replace(parsed, show=show)
    renderer = VectorRenderer("m", asked, Assembler)
    body = answer(asked, renderer, [UserReply(1, "", b"", 2, 0, 0, pooled=VECTOR.tobytes())])
    assert threads and threads[0] is not threading.main_thread()
    (shown,) = body["data"]
    assert np.array(shown["embedding"], "<f4").tobytes() == VECTOR.tobytes()


@pytest.mark.parametrize(
    ("num_replies", "fields", "is_aside"),
    [(3, {}, False), (MANY_REPLIES + 1, {}, True), (3, {"logprobs": True, "top_logprobs": 2}, True)],
)
def test_long_answers_are_written_beside_the_event_loop(num_replies: int, fields: Any, is_aside: bool) -> None:
    """As one is that has log-probabilities: others' streams wait for neither. Nobody looks for garbage meanwhile."""
    seen: list[tuple[bool, bool]] = []

    class Watched(ChatRenderer):
        def body(self, choices: Any) -> Any:
            seen.append((threading.current_thread() is not threading.main_thread(), not gc.isenabled()))
            return super().body(choices)

    asked = parse_chat(json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode(), {})
    told = (TokenLogprob(5, b"x", -0.5, [TopLogprob(5, b"x", -0.5)]),) if fields else ()
    reply = UserReply(1, "x", pack_ids([5]), 2, 1, 0, logprobs=told)
    end = msgspec.structs.replace(reply, finish_reason=FinishReason.LENGTH)
    body = answer(asked, Watched("m", asked, Assembler), [reply] * (num_replies - 1) + [end])
    assert seen == [(is_aside, is_aside)] and gc.isenabled()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "x" * num_replies and choice["finish_reason"] == "length"
    assert len((choice["logprobs"] or {"content": ()})["content"]) == num_replies * bool(fields)
