"""The answer to a request: its replies collected, or streamed as they come; and its end when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from minisgl.errors import MiniSGLError, RequestError
from minisgl.message.messages import UserReply
from minisgl.server.admission import Place
from minisgl.server.answers.openai import mean_logprob
from minisgl.server.answers.renderer import Renderer, event
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.errors import json_response, renamed, shown
from minisgl.server.frontend import Frontend, Stream

logger = logging.getLogger(__name__)

ACCEPT_SECONDS = 5.0  # that a stream's header waits for what may refuse the request: encoding, and compiling a grammar

TIMEOUT = "x-request-timeout"  # seconds
# How long OpenAI's and Anthropic's libraries wait for an answer, or for the next part of a stream.
LIBRARY_TIMEOUTS = ("x-stainless-read-timeout", "x-stainless-timeout")
_NUMBER = re.compile(r"\d{1,6}(\.\d{1,15})?", re.ASCII)

T = TypeVar("T")


async def answer_request(
    frontend: Frontend, request: Request, parsed: GenerationRequest, renderer: Renderer, keepalive: float
) -> Response:
    """Run the request and show its replies. A client that goes away takes its request with it."""
    streams: list[Stream] = []  # one per choice, for each prompt in order
    request_ids = (request.state.request_id, renderer.id, request.state.owner)
    try:
        place: Place = request.state.place
        place.take(len(parsed.prompts) * parsed.num_choices - 1)
        salt = request.state.owner + parsed.params.cache_salt
        params = replace(parsed.params, cache_salt=salt, client=place.client)
        send = partial(frontend.submit, notify=parsed.stream, count=parsed.num_choices, begin=place.begin)
        for prompt in parsed.prompts:
            streams += send(prompt, params, request_ids)
        if seconds := _seconds(parsed, request.headers):
            late = RequestError(f"no answer within {seconds:g} s, as the request has it", code="timeout", status=504)
            place.timer = asyncio.get_running_loop().call_later(seconds, _abort, streams, late)
        request.state.answer = renderer
        if not parsed.stream:
            choices = await unless_disconnected(request.receive, _collect(streams, renderer))
            return json_response(renderer.body(_best(choices, parsed)))
        # What is refused gets an HTTP status; once the request is on its way, an error is an event.
        await unless_disconnected(request.receive, _accepted(streams))
        return EventStream(streams, renderer, keepalive)
    except BaseException as error:
        _abort(streams)
        if isinstance(error, RequestError):
            raise renamed(error, parsed.names) from None
        raise


def _best(choices: Sequence[Sequence[UserReply]], parsed: GenerationRequest) -> Sequence[Sequence[UserReply]]:
    """Of each prompt's choices the `n` most probable ones per token, best first; all where there are no more."""
    if parsed.num_choices == parsed.n:
        return choices
    groups = (choices[first : first + parsed.num_choices] for first in range(0, len(choices), parsed.num_choices))
    return [choice for group in groups for choice in sorted(group, key=mean_logprob, reverse=True)[: parsed.n]]


def _seconds(parsed: GenerationRequest, headers: Headers) -> float:
    """How long the answer may take; 0: for ever. Raises: RequestError when the client's own header is no number."""
    own = headers.get(TIMEOUT, "0")
    if not _NUMBER.fullmatch(own):
        raise RequestError(f"{TIMEOUT} must be a number of seconds, not {shown(own)!r}")
    names = () if parsed.stream else LIBRARY_TIMEOUTS
    told = [float(value) for name in names if _NUMBER.fullmatch(value := headers.get(name, ""))]
    return min(filter(None, [parsed.timeout, float(own), *told]), default=0.0)


def _abort(streams: Sequence[Stream], error: RequestError | None = None) -> None:
    for stream in streams:
        stream.abort(error)


async def _accepted(streams: Sequence[Stream]) -> None:
    """Wait until none of them is refused any more, or one has taken too long. Raises: RequestError, WorkerDied."""
    with contextlib.suppress(asyncio.TimeoutError):
        for stream in streams:
            await asyncio.wait_for(stream.accepted(), ACCEPT_SECONDS)


async def _collect(streams: Sequence[Stream], renderer: Renderer) -> list[list[UserReply]]:
    """All replies of each choice. The first error ends it."""
    choices: list[list[UserReply]] = [[] for _ in streams]
    async with contextlib.aclosing(_interleave(streams)) as replies:
        async for index, reply in replies:
            choices[index].append(reply)
            renderer.last[index] = reply
    return choices


async def _interleave(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, UserReply], None]:
    """The replies of all streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async for reply in streams[0]:
            yield 0, reply
        return
    tasks = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = tasks.pop(task)
                reply = task.result()
                if reply.finish_reason is None:
                    tasks[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, reply
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come, an error included, until they end or the client goes away; then aborts what is left.

    The renderer's `keep_alive` is sent after so many `seconds` of nothing else (0: never), for proxies and clients that
    would give up. Events go out whole, so it stands between two of them.
    """

    media_type = "text/event-stream"

    def __init__(self, streams: Sequence[Stream], renderer: Renderer, seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._streams, self._renderer, self._seconds, self._last_sent = streams, renderer, seconds, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            with contextlib.suppress(ClientDisconnect):  # which has been told
                await unless_disconnected(receive, self._send(send))
        finally:
            _abort(self._streams)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keeper = asyncio.ensure_future(self._keep(send))
        try:
            async with contextlib.aclosing(self._events()) as events:
                async for data in events:
                    self._last_sent = time.monotonic()
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            keeper.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep(self, send: Send) -> None:
        self._last_sent = time.monotonic()
        while self._seconds:
            left = self._last_sent + self._seconds - time.monotonic()
            if left <= 0:
                self._last_sent, left = time.monotonic(), self._seconds
                await send({"type": "http.response.body", "body": self._renderer.keep_alive, "more_body": True})
            await asyncio.sleep(left)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        renderer = self._renderer
        try:
            async with contextlib.aclosing(_interleave(self._streams)) as replies:
                async for index, reply in replies:
                    renderer.last[index] = reply
                    if chunks := renderer.chunk(index, reply):
                        yield b"".join(map(event, chunks))
            yield b"".join(map(event, renderer.last_chunks())) + renderer.done
        except MiniSGLError as error:
            logger.debug("a stream ends with an error: %s", error)
            yield b"".join(map(event, renderer.failure(error)))


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it when the client goes away. Raises: ClientDisconnect then."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        logger.debug("a client went away; its request is aborted")
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
