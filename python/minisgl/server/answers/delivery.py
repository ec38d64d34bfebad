"""The answer to a request: its replies collected, or streamed as they come; and its end when the client goes away."""

import asyncio
import contextlib
import logging
import re
import time
from dataclasses import replace
from functools import partial

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
from minisgl.server.bodies.intake import uncollected
from minisgl.server.errors import json_response, renamed, shown
from minisgl.server.frontend import Frontend, Stream

logger = logging.getLogger(__name__)

MANY_REPLIES = 512  # take milliseconds to be shown: beside the event loop
ACCEPT_SECONDS = 5.0  # that a stream's header waits for what may refuse the request: encoding, and compiling a grammar
TIMEOUT = "x-request-timeout"  # seconds
# How long OpenAI's and Anthropic's libraries wait for an answer, or for the next part of a stream.
LIBRARY_TIMEOUTS = ("x-stainless-read-timeout", "x-stainless-timeout")
_NUMBER = re.compile(r"\d{1,6}(\.\d{1,15})?", re.ASCII)


async def answer_request(
    frontend: Frontend, request: Request, parsed: GenerationRequest, renderer: Renderer, keepalive: float
) -> Response:
    """Run the request and show its replies. A client that goes away takes its request with it."""
    place: Place = request.state.place
    place.take(len(parsed.prompts) * parsed.num_choices - 1)
    salt, seconds = request.state.owner + parsed.params.cache_salt, _seconds(parsed, request.headers)
    params = replace(parsed.params, cache_salt=salt, client=place.client)
    ids = (request.state.request_id, renderer.id, request.state.owner)
    send = partial(frontend.submit, notify=parsed.stream, count=parsed.num_choices, begin=place.begin)
    stream = send(parsed.prompts, params, ids)  # the outputs of the first prompt, those of the second …
    watcher = asyncio.ensure_future(_watch(request.receive, stream))
    try:
        if seconds:
            late = RequestError(f"no answer within {seconds:g} s, as the request has it", code="timeout", status=504)
            place.timer = asyncio.get_running_loop().call_later(seconds, stream.abort, late)
        request.state.answer = renderer
        if not parsed.stream:
            choices: list[list[UserReply]] = [[] for _ in stream.outputs]
            async for index, reply in stream:  # the first error ends it
                choices[index].append(reply)
                renderer.last[index] = reply
            if (size := parsed.num_choices) > parsed.n:  # of each prompt's the most probable ones per token, best first
                groups = (choices[first : first + size] for first in range(0, len(choices), size))
                choices = [one for some in groups for one in sorted(some, key=mean_logprob, reverse=True)[: parsed.n]]
            if parsed.params.pooling or parsed.logprobs or sum(map(len, choices)) > MANY_REPLIES:
                return await asyncio.to_thread(uncollected, lambda: json_response(renderer.body(choices)))
            return json_response(renderer.body(choices))
        # What is refused gets an HTTP status; once the request is on its way, an error is an event.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stream.accepted(), ACCEPT_SECONDS)
        return EventStream(stream, renderer, keepalive)
    except BaseException as error:
        stream.abort()
        if isinstance(error, RequestError):
            raise renamed(error, parsed.names) from None
        raise
    finally:
        watcher.cancel()


async def _watch(receive: Receive, stream: Stream) -> None:
    """When the client goes away, end the stream: whoever reads it gets a ClientDisconnect."""
    while (await receive())["type"] != "http.disconnect":
        pass
    logger.debug("a client went away; its request is aborted")
    stream.abort(ClientDisconnect())


def _seconds(parsed: GenerationRequest, headers: Headers) -> float:
    """How long the answer may take; 0: for ever. Raises: RequestError when the client's own header is no number."""
    own = headers.get(TIMEOUT, "0")
    if not _NUMBER.fullmatch(own):
        raise RequestError(f"{TIMEOUT} must be a number of seconds, not {shown(own)!r}")
    names = () if parsed.stream else LIBRARY_TIMEOUTS
    told = [float(value) for name in names if _NUMBER.fullmatch(value := headers.get(name, ""))]
    return min(filter(None, [parsed.timeout, float(own), *told]), default=0.0)


class EventStream(Response):
    """Sends events as they come, an error included, until they end or the client goes away; then aborts what is left.

    The renderer's `keep_alive` is sent after so many `seconds` of nothing else (0: never), for proxies and clients that
    would give up. Events go out whole, so it stands between two of them.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, renderer: Renderer, seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stream, self._renderer, self._seconds, self._last_sent = stream, renderer, seconds, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        watcher = asyncio.ensure_future(_watch(receive, self._stream))
        try:
            with contextlib.suppress(ClientDisconnect):  # which has been told
                await self._send(send)
        finally:
            watcher.cancel()
            self._stream.abort()

    async def _send(self, send: Send) -> None:
        renderer = self._renderer
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keeper = asyncio.ensure_future(self._keep(send))
        try:
            async for index, reply in self._stream:
                renderer.last[index] = reply
                if chunks := renderer.chunk(index, reply):
                    await self._write(send, b"".join(map(event, chunks)))
            await self._write(send, b"".join(map(event, renderer.last_chunks())) + renderer.done)
        except MiniSGLError as error:
            logger.debug("a stream ends with an error: %s", error)
            await self._write(send, b"".join(map(event, renderer.failure(error))))
        finally:
            keeper.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        self._last_sent = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _keep(self, send: Send) -> None:
        self._last_sent = time.monotonic()
        while self._seconds:
            left = self._last_sent + self._seconds - time.monotonic()
            if left <= 0:
                await self._write(send, self._renderer.keep_alive)
            await asyncio.sleep(left if left > 0 else self._seconds)
