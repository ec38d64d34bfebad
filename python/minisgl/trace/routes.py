"""The trace over HTTP: whoever asks finds their own requests, the operator all."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request, Response
from msgspec.structs import asdict, replace

from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError, WorkerDied
from minisgl.message.messages import TraceReply
from minisgl.trace.export import Json, chart, exports
from minisgl.trace.journal import Arrivals, Journal, Story
from minisgl.trace.records import Recorded, Step, decode_recorded, encode_json

MAX_STEPS, MAX_LIVE_STEPS, MAX_REQUESTS, MAX_OUTPUTS, MAX_VIEWERS = 2048, 64, 1024, 4096, 8
ANSWER_SECONDS = 2.0
PACE_SECONDS = 60.0  # that slow motion lasts, unless it is asked for again
EXPORT_SECONDS = 0.2  # in which requests end that are asked for at once
_REST = 4  # times as long as an answer took, nothing more is asked: who asks much costs the others little

Question = Callable[..., Awaitable[TraceReply]]  # of so many seconds' time, and fields of a `TraceMsg`


class Pace(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /trace/pace."""

    delay_ms: Annotated[int, msgspec.Meta(ge=0, le=2000)] = 0
    paused: bool = False


class Trace:
    """Requests and steps of late, and what goes on now. ask: fields of a `TraceMsg`. metrics: the API server's."""

    def __init__(self, ask: Question, journal: Journal, metrics: Any, config: ServerConfig) -> None:
        self._send, self._journal, self._metrics = ask, journal, metrics
        self._turn, self._viewers = asyncio.Lock(), asyncio.Semaphore(MAX_VIEWERS)
        self._may_slow = config.slow_motion or bool(config.access.api_keys or config.access.admin_keys)
        self._pace, self._pace_end = Pace(), 0.0
        self._exports, self._sent = exports(config), list[Story]()
        self._exporting: asyncio.Task[None] | None = None
        journal.keep_prompts, journal.on_sent = config.trace_prompts, self._put

    def add_to(self, app: FastAPI, paths: Collection[str]) -> None:
        """paths: of requests for outputs."""
        app.add_middleware(Arrivals, journal=self._journal, paths=paths)
        app.post("/trace/pace")(self.pace)
        app.get("/trace")(self.trace)
        app.get("/trace/live")(self.live)
        app.get("/trace/{request_id}")(self.request)

    async def request(self, request: Request, request_id: str) -> Response:
        """What has become of a request, event by event; of several with this id, of the last."""
        found = [story for story in self._visible(request) if request_id in story.ids[:2]]
        if not found:
            raise RequestError("there is no such request, or no more", status=404, code="unknown_request")
        return _json((await self._told(found[-1:], request.state.owner))[0][0])

    async def trace(self, request: Request) -> Response:
        """The last steps, and the requests of late."""
        query, visible, state = request.query_params, self._visible(request), request.state
        if query.get("format", "json") not in ("json", "perfetto"):
            raise RequestError("format must be json or perfetto", param="format")
        num_steps, num_requests = _count(query, "steps", 256, MAX_STEPS), _count(query, "requests", 64, MAX_REQUESTS)
        told, steps = await self._told(visible[-num_requests:] if num_requests else [], state.owner, num_steps)
        if not state.operator:
            own = {output.uid for story in visible for output in story.outputs.values()}
            steps = [step for whole in steps if (step := _part(whole, own)).rows]
        if query.get("format") == "perfetto":
            return _json(chart(told, steps), {"content-disposition": 'attachment; filename="trace.json"'})
        return _json({"requests": told, "steps": steps})

    async def live(self, request: Request) -> Response:
        """What the server does now, and its steps from one on, for whoever asks a few times a second."""
        since, whole = _count(request.query_params, "since", 0, 2**31), _count(request.query_params, "whole", 1, 1)
        if self._viewers.locked():
            raise RequestError("there are as many viewers as may be", status=429, code="too_many_viewers")
        async with self._viewers:
            pace = self._pace if time.monotonic() < self._pace_end else Pace()
            wanted = {"since": since, "delay": pace.delay_ms / 1e3, "paused": pace.paused}
            recorded = await self._ask(view=1 + whole, num_steps=MAX_LIVE_STEPS, **wanted)
        stories, metrics = self._journal.stories, self._metrics
        outputs = [
            {"uid": one.uid, "id": story.ids[0], "since": story.validated, "why": one.events[1].why}
            | {"num_output": one.num_output}
            for story in stories
            for one in story.outputs.values()
            if one.reason is None
        ]
        counts = {"num_output": metrics.num_output, "num_ended": sum(metrics.num_finished.values())}
        counts |= {"ttft": metrics.time_to_first_token, "itl": metrics.inter_token_latency}
        head = {"time": time.time(), "pace": pace, "may_slow": self._may_slow, "outputs": outputs, "counts": counts}
        return _json({**head, "steps": recorded.steps, **(recorded.now or {})})

    async def pace(self, request: Request) -> Response:
        """Slow motion for all requests, while somebody looks: a delay before each step, or a pause."""
        if not self._may_slow:
            message = "slow motion needs a server with API keys, or --slow-motion"
            raise RequestError(message, status=403, code="slow_motion_off")
        try:
            self._pace = msgspec.json.decode(await request.body(), type=Pace)
        except msgspec.DecodeError as error:
            raise RequestError(f"the body is not as expected: {error}") from None
        self._pace_end = time.monotonic() + PACE_SECONDS
        return _json({**asdict(self._pace), "seconds": PACE_SECONDS})

    def _put(self, story: Story) -> None:
        """An answer is out."""
        if self._exports:
            self._sent.append(story)
            if self._exporting is None or self._exporting.done():
                self._exporting = asyncio.create_task(self._export(), name="trace-export")

    async def _export(self) -> None:
        while self._sent:
            await asyncio.sleep(EXPORT_SECONDS)
            stories, self._sent = self._sent, []
            told, _ = await self._told(stories, "")
            for story, one in zip(stories, told, strict=True):
                for export in self._exports:
                    export(story.headers, one)

    def _visible(self, request: Request) -> list[Story]:
        """What whoever asks may see, the last ones last."""
        state, stories = request.state, self._journal.stories
        return [story for story in stories if state.operator or story.ids[2] == state.owner]

    async def _told(self, stories: Sequence[Story], owner: str, num_steps: int = 0) -> tuple[list[Json], list[Step]]:
        """Requests, and the last steps; without what rank 0 knows where it does not answer."""
        uids, recorded = [output.uid for story in stories for output in story.outputs.values()], Recorded([], [], None)
        with suppress(WorkerDied):
            recorded = await self._ask(uids=tuple(uids[-MAX_OUTPUTS:]), num_steps=num_steps)
        known = {output.uid: output for output in recorded.outputs}
        return [story.told(known, owner) for story in stories], recorded.steps

    async def _ask(self, **wanted: Any) -> Recorded:
        """One question at a time. Raises: WorkerDied."""
        loop = asyncio.get_running_loop()
        await self._turn.acquire()
        begin = loop.time()
        try:
            return decode_recorded((await self._send(ANSWER_SECONDS, **wanted)).data)
        finally:
            loop.call_later(_REST * (loop.time() - begin), self._turn.release)


def _part(step: Step, own: set[int]) -> Step:
    """What there is to tell of a step to those whose rows these are."""
    rows = [row for row in step.rows if row[1] in own]
    counts = {"num_decode": sum(not row[3] for row in rows), "num_tokens": sum(row[2] for row in rows)}
    return replace(step, rows=rows, **counts, pages=None, running=None, waiting=None)


def _count(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text[:12]) <= most):
        raise RequestError(f"{name} must be a whole number from 0 to {most}", param=name)
    return int(text)


def _json(payload: object, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(payload), headers=headers, media_type="application/json")
