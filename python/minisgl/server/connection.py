"""HTTP connections whose clients are slow, or too many: each wait for a client has an end."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from minisgl.server.errors import dump_json, error_body

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
