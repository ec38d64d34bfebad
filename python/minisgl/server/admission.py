"""What the server takes on: connections that are slow, or too many, have an end; and the door, which says how much may
be on its way, whose, and whose turn it is to be read."""

import asyncio
import os
import random
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from minisgl.env import env_number
from minisgl.errors import RequestError
from minisgl.server.access import address_of
from minisgl.server.errors import dump_json, error_body, error_response
from minisgl.utils.fairness import FairQueue

MIN_RATE = 1024  # bytes a second, of a body
LINGER_SECONDS = 2  # for what a client still has under way when it is answered; else it might not see the answer
MAX_LINGERING = 16  # connections beyond the limit
_HEAD = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\nconnection: close"


class Connection(H11Protocol):
    """uvicorn's, within limits. Every `read` seconds a request that has begun must have ended, or brought MIN_RATE;
    every `write` seconds some of an answer must have been taken. Beyond config.limit_concurrency, it is refused."""

    def __init__(self, *args: Any, read: float, write: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read, self._write, self._limit, self.limit_concurrency = read, write, self.limit_concurrency or 0, None
        self._num_read, self._has_ended = 0, False
        self._reading: asyncio.TimerHandle | None = None  # runs while something of a request is missing
        self._writing: asyncio.TimerHandle | None = None  # has run since an answer last had to wait

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # the application is to wait, not its answers; TLS never ends with 0
        self._watch()
        if len(self.connections) > self._limit:
            self._end(503, "there are too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self._reading, self._writing)):
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._has_ended:
            self._num_read += len(data)
            super().data_received(data)
            self._watch()

    def send_400_response(self, msg: str) -> None:
        self._end(400, msg)  # also where the head made sense: nobody answers beside

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading is not None and self.conn.their_state is h11.SEND_BODY:  # which nobody wants
            self._reading.cancel()
            self._reading = self.loop.call_later(LINGER_SECONDS, self._on_slow_request)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._on_slow_reader(None)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def _on_slow_reader(self, before: int | None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._writing = self.loop.call_later(self._write, self._on_slow_reader, left)

    def _watch(self) -> None:
        is_missing = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if is_missing and self._reading is None:
            self._num_read, self._reading = 0, self.loop.call_later(self._read, self._on_slow_request)
        elif not is_missing and self._reading is not None:
            self._reading = self._reading.cancel()  # type: ignore[func-returns-value]

    def _on_slow_request(self) -> None:
        self._reading, is_head = None, self.conn.their_state is h11.IDLE
        if not self.conn.trailing_data[0] if is_head else self.cycle.response_started:
            self.transport.close()
        elif self.flow.read_paused or self._num_read >= MIN_RATE * self._read:
            self._watch()
        else:
            self._end(408, f"the request did not arrive within {self._read:g} s")

    def _end(self, status: int, message: str) -> None:
        """Answer in the place of the application, as OpenAI's and Anthropic's clients both read it, and close: our half
        now, the rest once the client has seen it."""
        body = dump_json({"type": "error", **error_body(message, status)})
        self._has_ended = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_HEAD % (status, STATUS_PHRASES[status], len(body)) + b"\r\n\r\n" + body)
        if self.transport.can_write_eof() and len(self.connections) <= self._limit + MAX_LINGERING:
            with suppress(OSError):  # who is gone already
                self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        else:
            self.transport.close()


def http_config(app: ASGIApp, limit: int, kind: type[Connection] = Connection, **more: Any) -> uvicorn.Config:
    """How uvicorn serves an application, within limits: see `Connection`. limit: of connections. more: of uvicorn's."""
    timeouts = {"READ": 20.0, "WRITE": 30.0}  # seconds
    read, write = (env_number(f"MINISGL_{name}_TIMEOUT", timeouts[name], low=0.1, high=86400) for name in timeouts)
    more |= {"interface": "asgi3", "lifespan": "off", "log_config": None, "access_log": False, "timeout_keep_alive": 60}
    more |= {"ws": "none", "limit_concurrency": limit, "http": partial(kind, read=read, write=write)}
    more["proxy_headers"] = "FORWARDED_ALLOW_IPS" in os.environ  # else anybody may say where a request comes from
    return uvicorn.Config(app, **more)


BYTES_PER_TOKEN = 4  # of a body, as long as its tokens are not known
TURNS = 8  # requests read in one round of the event loop: whoever asks for little waits for no more than these
MAX_RETRY_SECONDS = 60
OUTPUTS, BYTES = "requests are running or waiting", "bytes of prompts are waiting"  # what has limits
ALWAYS = ("/abort_request", "/flush_cache")  # what the operator does about a crowd


class Place:
    """One request's share of what waits. client: whose it is; timer: what ends the request, unless it ends before."""

    def __init__(self, door: "Admission", client: str) -> None:
        self.client, self._door = client, door
        self._taken: Counter[str] = Counter()
        self.timer: asyncio.TimerHandle | None = None

    def take(self, outputs: int, size: int = 0) -> None:
        """More than was known. size: bytes. Raises: RequestError (429) when there is no room for it.

        One client alone may have all of a limit; however many crowd in, the next one finds room in an eighth on top,
        and one place at least.
        """
        for what, count in ((OUTPUTS, outputs), (BYTES, size)):
            total, own, limit = self._door.used[what, None], self._door.used[what, self.client], self._door.limits[what]
            if total and count and own + count + 8 * (total + count) > 8 * limit + max(9, limit):
                self.leave()
                raise self._door.refusal(f"{total} {what}")
            self._add(what, count)

    def begin(self) -> None:
        """The prompt waits no more."""
        self._add(BYTES, -self._taken[BYTES])

    def leave(self) -> bool:
        """Whether it was still held."""
        was_held = self._taken[OUTPUTS] > 0
        for what in (OUTPUTS, BYTES):
            self._add(what, -self._taken[what])
        if self.timer is not None:
            self.timer.cancel()
        return was_held

    def _add(self, what: str, count: int) -> None:
        self._taken[what] += count
        for whose in (None, self.client):
            self._door.used[what, whose] += count
            if not self._door.used[what, whose]:
                del self._door.used[what, whose]


class Admission:
    """Around what reads bodies: refuses what finds no room, before it is read, and lets the others in by turns."""

    def __init__(self, app: ASGIApp, outputs: int, size: int, *, fair: bool) -> None:
        self._app, self._fair, self.limits = app, fair, {OUTPUTS: outputs, BYTES: size}
        self.used: Counter[tuple[str, str | None]] = Counter()  # by whom; None: by all
        self._left: deque[float] = deque(maxlen=256)  # when the last ones did
        self._turns: FairQueue[tuple[str, asyncio.Future[None]]] = FairQueue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or scope["path"] in ALWAYS:
            await self._app(scope, receive, send)
            return
        client = scope["state"]["owner"][:16] or address_of(scope)
        place = scope["state"]["place"] = Place(self, client if self._fair else "")
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared[:15]) if declared.isdecimal() else 0

        async def receive_counted() -> Message:
            message = await receive()
            if not size:  # which was not told
                place.take(0, len(message.get("body", b"")))
            return message

        try:
            place.take(1, size)
            await self._turn(place.client)
            await self._app(scope, receive_counted, send)
        except RequestError as error:
            await error_response(scope, error)(scope, receive, send)
        finally:
            if place.leave():  # who was refused tells nothing of the pace
                self._left.append(asyncio.get_running_loop().time())

    def refusal(self, why: str) -> RequestError:
        """An error that says when to come again: when, at the pace of the last ones, half of those here have left."""
        passed = asyncio.get_running_loop().time() - self._left[0] if self._left else 0.0
        crowd = self.used[OUTPUTS, None] / max(1, len(self._left))
        wait = min(MAX_RETRY_SECONDS, 1 + int(passed * crowd * random.uniform(0.4, 0.6)))
        error = RequestError(f"{why}; try again in {wait} s", code="rate_limit_exceeded", status=429)
        error.retry_after = wait
        return error

    async def _turn(self, client: str) -> None:
        loop = asyncio.get_running_loop()
        if not self._turns:
            loop.call_soon(self._next)
        turn = loop.create_future()
        self._turns.put(client, id(turn), (client, turn))
        await turn

    def _next(self) -> None:
        for _ in range(min(TURNS, len(self._turns))):
            client, turn = next(iter(self._turns.turn().values()))
            self._turns.remove(client, id(turn))
            self._turns.charge(client, 1)
            if not turn.done():  # cancelled, as all requests are at the very end
                turn.set_result(None)
        if self._turns:
            asyncio.get_running_loop().call_soon(self._next)
