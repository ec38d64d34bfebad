"""The trace over HTTP: whoever asks finds their own requests, the operator all."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import orjson
import yaml
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError, WorkerDied
from minisgl.message.messages import TraceReply
from minisgl.trace.export import Exporter, exports
from minisgl.trace.journal import Arrivals, Entry, Journal, story
from minisgl.trace.live import Live
from minisgl.trace.perfetto import chart
from minisgl.trace.recorder import Json, Recorded, decode_recorded

MAX_STEPS, MAX_REQUESTS, MAX_OUTPUTS = 2048, 1024, 4096
ANSWER_SECONDS = 2.0
_REST = 4  # times as long as an answer took, nothing more is asked: who asks much costs the others little

Question = Callable[..., Awaitable[TraceReply]]  # of so many seconds' time, and fields of a `TraceMsg`


class Pace(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /trace/pace."""

    viewer: str
    delay_ms: int = 0
    paused: bool = False


class Trace:
    """Requests and steps of late, and the live view. ask: of a `TraceMsg`, by its fields."""

    def __init__(self, ask: Question, journal: Journal, metrics: Any, config: ServerConfig) -> None:
        self._send, self._journal, self._turn = ask, journal, asyncio.Lock()
        self._live = Live(self._ask, journal, metrics, config)
        journal.keep_prompts = config.trace_prompts
        journal.on_sent = Exporter(self._stories, exports(config)).put

    def add_to(self, app: FastAPI) -> None:
        app.add_middleware(Arrivals, journal=self._journal)
        app.get("/trace")(self.trace)
        app.get("/trace/stages")(self.stages)
        app.get("/trace/live")(self.live)
        app.post("/trace/pace")(self.pace)
        app.get("/trace/{request_id}")(self.request)

    async def stages(self) -> Response:
        """The stages of a request, and the code that does each in this version."""
        return _json({"version": minisgl.__version__, "stages": stages()})

    async def request(self, request: Request, request_id: str) -> Response:
        """What has become of a request, stage by stage; of several with this id, of the last."""
        entries = [entry for entry in self._visible(request) if request_id in entry.ids[:2]]
        if not entries:
            raise RequestError("there is no such request, or no more", status=404, code="unknown_request")
        return _json((await self._told(request, entries[-1:], 0))["requests"][0])

    async def trace(self, request: Request) -> Response:
        """The last steps, and the requests of late."""
        query = request.query_params
        if query.get("format", "json") not in ("json", "perfetto"):
            raise RequestError("format must be json or perfetto", param="format")
        num_steps, num_requests = _count(query, "steps", 256, MAX_STEPS), _count(query, "requests", 64, MAX_REQUESTS)
        told = await self._told(request, self._visible(request)[-num_requests:] if num_requests else [], num_steps)
        if query.get("format") == "perfetto":
            return _json(chart(**told), {"content-disposition": 'attachment; filename="trace.json"'})
        return _json(told)

    async def live(self) -> Response:
        """What the server does now, as events, while somebody looks."""
        self._live.check_room()
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(self._live.events(), media_type="text/event-stream", headers=headers)

    async def pace(self, request: Request) -> Response:
        """Slow motion, for all requests: a delay before each step, or a pause."""
        try:
            wish = msgspec.json.decode(await request.body(), type=Pace)
        except msgspec.DecodeError as error:
            raise RequestError(f"the body is not as expected: {error}") from None
        return _json(self._live.slow_down(wish.viewer, wish.delay_ms, wish.paused))

    def _visible(self, request: Request) -> list[Entry]:
        """What whoever asks may see, the last ones last."""
        state, entries = request.state, self._journal.entries
        return [entry for entry in entries if state.operator or entry.ids[2] == state.owner]

    async def _told(self, request: Request, entries: Sequence[Entry], num_steps: int) -> dict[str, list[Json]]:
        """These requests, and the last steps, as far as whoever asks may see them. Raises: WorkerDied."""
        recorded = await self._remembered(entries, num_steps)
        told, steps = _stories(entries, recorded, request.state.owner), recorded.steps
        if not request.state.operator:
            own = {uid for entry in self._visible(request) for uid in entry.uids}
            steps = [step for full in steps if (step := _part(full, own))["rows"]]
        return {"requests": told, "steps": steps}

    async def _stories(self, entries: Sequence[Entry]) -> list[Json]:
        """What there is to tell of these, though rank 0 may have nothing to say."""
        recorded = Recorded([], [], None)
        with suppress(WorkerDied):
            recorded = await self._remembered(entries, 0)
        return _stories(entries, recorded, "")

    async def _remembered(self, entries: Sequence[Entry], num_steps: int) -> Recorded:
        uids = [uid for entry in entries for uid in entry.uids]
        return await self._ask(uids=tuple(uids[-MAX_OUTPUTS:]), num_steps=num_steps)

    async def _ask(self, **wanted: Any) -> Recorded:
        """One question at a time. Raises: WorkerDied."""
        loop = asyncio.get_running_loop()
        await self._turn.acquire()
        begin = loop.time()
        try:
            return decode_recorded((await self._send(ANSWER_SECONDS, **wanted)).data)
        finally:
            loop.call_later(_REST * (loop.time() - begin), self._turn.release)


def _stories(entries: Sequence[Entry], recorded: Recorded, owner: str) -> list[Json]:
    records = {record.uid: record for record in recorded.requests}
    return [story(entry, records, owner) for entry in entries]


def _part(step: Json, own: set[int]) -> Json:
    """What there is to tell of a step to those whose rows these are."""
    rows = [row for row in step["rows"] if row[1] in own]
    counts = {"num_decode": sum(not row[3] for row in rows), "num_tokens": sum(row[2] for row in rows)}
    return {**step, "rows": rows, **counts, "pages": None, "running": None, "waiting": None}


@cache
def stages() -> list[Json]:
    """Each stage, and the code that does it in this version. Raises: KeyError where it names what is not."""
    table = yaml.safe_load(Path(__file__).with_name("stages.yaml").read_text(encoding="utf-8"))
    return [{**about, "name": name, "code": [*map(_code, about["code"])]} for name, about in table.items()]


def _code(place: str) -> Json:
    file, _, name = place.partition(":")
    text = Path(__file__).parents[1].joinpath(file).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        node = {getattr(child, "name", ""): child for child in node.body}[part]
    lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
    return {"file": file, "name": name, "first": node.lineno, "last": node.end_lineno, "text": "".join(lines)}


def _json(payload: Json, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(payload), headers=headers, media_type="application/json")


def _count(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text[:9]) <= most):
        raise RequestError(f"{name} must be a whole number from 0 to {most}", param=name)
    return int(text)
