"""The door: how much may be on its way, whose, and whose turn it is to be read."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError
from minisgl.server.access import address_of
from minisgl.server.errors import error_response
from minisgl.utils.fairness import FairQueue

BYTES_PER_TOKEN = 4  # of a body, as long as its tokens are not known
TURNS = 8  # requests read in one round of the event loop: whoever asks for little waits for no more than these
MAX_RETRY_SECONDS = 60
OUTPUTS, BYTES = "requests are running or waiting", "bytes of prompts are waiting"  # what has limits
ALWAYS = ("/abort_request", "/flush_cache")  # what the operator does about a crowd


class Place:
    """One request's share of what waits. client: whose it is; timer: what ends the request, unless it ends before."""

    def __init__(self, door: Admission, client: str) -> None:
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

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._fair = app, config.fairness
        outputs = config.scheduler.max_running_requests + config.max_queued_requests
        self.limits = {OUTPUTS: outputs, BYTES: config.max_queued_tokens * BYTES_PER_TOKEN}
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
