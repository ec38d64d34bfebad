"""The live view: while somebody looks, rank 0 is asked a few times a second, and all who look are told the same."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from itertools import accumulate
from typing import Any, Protocol

import orjson

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.errors import MiniSGLError, RequestError
from minisgl.message.messages import Histogram, TraceReply
from minisgl.trace.journal import Journal
from minisgl.trace.recorder import Json, Recorded, decode_recorded

INTERVAL = 0.25  # seconds
MAX_VIEWERS = 16
MAX_UNREAD = 16  # events; the oldest are dropped
MAX_STEPS, MAX_HELD = 64, 64  # in one event
MAX_DELAY_MS = 2000
PACE_SECONDS = 60.0  # that slow motion lasts, unless it is asked for again
ANSWER_SECONDS = 2.0
WINDOW = 8  # events that rates and percentiles are of


class Frontend(Protocol):
    """The API server's side of the channels, and what it counts."""

    journal: Journal
    metrics: Any

    async def trace(self, timeout: float, **wanted: Any) -> TraceReply:
        """Asks rank 0. wanted: fields of a `TraceMsg`. Raises: WorkerDied."""


async def ask(frontend: Frontend, **wanted: Any) -> Recorded:
    """What rank 0 answers. Raises: WorkerDied."""
    return decode_recorded((await frontend.trace(ANSWER_SECONDS, **wanted)).data)


class Live:
    """Owns the viewers, and the pace that one of them has set."""

    def __init__(self, frontend: Frontend, config: ServerConfig) -> None:
        self._frontend, self._config = frontend, config
        self.may_slow = config.slow_motion or bool(config.access.api_keys or config.access.admin_keys)
        self._viewers: dict[str, asyncio.Queue[bytes]] = {}
        self._task: asyncio.Task[None] | None = None
        self._slow: tuple[str | None, int, bool, float] = (None, 0, False, 0.0)  # whose wish, delay, pause, until when
        self._window: deque[tuple[float, int, int, list[int], list[int]]] = deque(maxlen=WINDOW)
        self._since, self._stamp, self._seen = 0, 0, frozenset[int]()  # the last event's step, and its tree
        self._last: dict[str, bytes] = {}  # events by their names

    def check_room(self) -> None:
        """Raises: RequestError when nobody else may look."""
        if len(self._viewers) >= MAX_VIEWERS:
            raise RequestError("there are as many viewers as may be", status=429, code="too_many_viewers")

    def slow_down(self, viewer: str, delay_ms: int, paused: bool) -> Json:
        """Slow motion for all requests. Raises: RequestError when it may not be, or nobody of this name looks."""
        if not self.may_slow:
            message = "slow motion needs a server with API keys, or --slow-motion"
            raise RequestError(message, status=403, code="slow_motion_off")
        if not 0 <= delay_ms <= MAX_DELAY_MS:
            raise RequestError(f"delay_ms must be from 0 to {MAX_DELAY_MS}, not {delay_ms}", param="delay_ms")
        if viewer not in self._viewers:
            raise RequestError("no live stream has this name", param="viewer", status=409)
        self._slow = viewer, delay_ms, paused, time.monotonic() + PACE_SECONDS
        return {"delay_ms": delay_ms, "paused": paused, "seconds": PACE_SECONDS}

    async def events(self) -> AsyncIterator[bytes]:
        """For one viewer, as long as both sides are there."""
        viewer, unread = secrets.token_hex(8), asyncio.Queue[bytes](MAX_UNREAD)
        self._viewers[viewer] = unread
        self._last.clear()  # the tree and the pool are told again
        if self._task is None:
            self._task = asyncio.create_task(self._poll(), name="trace-live")
        try:
            yield _event("hello", self._hello(viewer))
            while event := await unread.get():
                yield event
        finally:
            del self._viewers[viewer]
            if self._slow[0] == viewer:
                self._slow = (None, 0, False, 0.0)

    async def _poll(self) -> None:
        number = 0
        try:
            while self._viewers:
                self._tell(await self._look(whole=number % 2 == 0))
                number += 1
                await asyncio.sleep(INTERVAL)
        except MiniSGLError as error:
            self._tell({"gone": {"error": str(error)}})
        finally:
            self._task = None
            for unread in self._viewers.values():
                _put(unread, b"")

    def _tell(self, events: Mapping[str, Json]) -> None:
        for name, payload in events.items():
            event = _event(name, payload)
            if event != self._last.get(name):
                self._last[name] = event
                for unread in self._viewers.values():
                    _put(unread, event)

    async def _look(self, *, whole: bool) -> dict[str, Json]:
        if time.monotonic() > self._slow[3]:
            self._slow = (None, 0, False, 0.0)
        viewer, delay_ms, paused, _ = self._slow
        asked = {"since": self._since, "num_steps": MAX_STEPS, "delay": delay_ms / 1e3, "paused": paused}
        recorded = await ask(self._frontend, view=1 + whole, **asked)
        now = recorded.now
        assert now is not None
        if whole:
            tree, stamp = now["tree"], self._stamp
            for node in tree["nodes"]:
                node["hit"] = node["stamp"] > stamp
                self._stamp = max(self._stamp, node.pop("stamp"))
            ids = frozenset(node["id"] for node in tree["nodes"])
            tree["evicted"], self._seen = sorted(self._seen - ids), ids
        if recorded.steps:
            last = recorded.steps[-1]  # the last two come again, when their times are known
            self._since = last["step"] + (1 if last["device_ms"] is not None else -1)
        events: dict[str, Json] = {name: now.pop(name) for name in ("tree", "pool") if name in now}
        pace = {"delay_ms": delay_ms, "paused": paused, "viewer": viewer}
        head = {"time": time.time(), "steps": recorded.steps, "pace": pace, "counters": self._counters()}
        events["state"] = {**head, **self._queues(now)}
        return events

    def _queues(self, now: Json) -> Json:
        """What rank 0 sees, with the names of requests and with those that are elsewhere."""
        known, begun, opened = frozenset(now.pop("known")), now.pop("num_begun"), self._frontend.journal.open
        ahead = [(uid, *found) for uid, found in opened.items() if uid not in known and not found[1].first]
        held = [(uid, entry) for uid, entry, output in ahead if output.has_grammar]
        for uid, entry in held[:MAX_HELD]:
            waiting = {"uid": uid, "num_tokens": 0, "why": "grammar", "retracted": False}
            now["waiting"].append({**waiting, "seconds": time.time() - entry.validated, "ahead": len(now["waiting"])})
        for request in (*now["running"], *now["waiting"]):
            request["id"] = opened[request["uid"]][0].ids[0] if request["uid"] in opened else ""
        queues = {"api": len(opened), "tokenizer": len(ahead) - len(held), "scheduler": now["num_waiting"] + len(held)}
        queues |= {"engine": now.pop("num_inflight")}
        queues |= {"detokenizer": max(0, sum([bool(output.first) for _, output in opened.values()]) - begun)}
        return {**now, "processes": [{"name": name, "queue": n, "alive": True} for name, n in queues.items()]}

    def _counters(self) -> Json:
        metrics, opened = self._frontend.metrics, self._frontend.journal.open
        ttft, itl, num_output = metrics.time_to_first_token, metrics.inter_token_latency, metrics.num_output
        now, num_ended = time.monotonic(), sum(metrics.num_finished.values())
        self._window.append((now, num_output, num_ended, [*ttft.counts], [*itl.counts]))
        since, output, ended, first, later = self._window[0]
        rates = {"tokens_per_s": num_output - output, "requests_per_s": num_ended - ended}
        percentiles = {"ttft_ms": _percentiles(ttft, first), "itl_ms": _percentiles(itl, later)}
        seconds = max(now - since, 1e-9)
        return {"in_flight": len(opened), **{name: n / seconds for name, n in rates.items()}, **percentiles}

    def _hello(self, viewer: str) -> Json:
        config, plan = self._config, self._config.scheduler
        limits: Json = {"rows": plan.max_running_requests, "budget": plan.max_prefill_length, "overlap": plan.overlap}
        limits |= {"pages": plan.num_pages or None, "page_size": plan.page_size, "policy": plan.schedule_policy}
        limits |= {"cache": plan.cache_type, "ranks": config.engine.tp_size, "tokenizers": config.num_tokenizer}
        about = {"viewer": viewer, "version": minisgl.__version__, "model": config.served_model_name}
        pace = {"allowed": self.may_slow, "max_delay_ms": MAX_DELAY_MS}
        return {**about, "interval_ms": int(1e3 * INTERVAL), "limits": limits, "pace": pace}


def _percentiles(histogram: Histogram, before: list[int]) -> Json | None:
    """Of what a histogram of seconds has gained, in ms: the upper bounds of the buckets that they lie in."""
    gained = [*accumulate(after - count for after, count in zip(histogram.counts, before, strict=True))]
    ends = [*zip((*histogram.bounds, histogram.bounds[-1]), gained, strict=True)]
    shares = {"p50": 0.5, "p95": 0.95} if gained[-1] else {}
    found = {name: next(1e3 * end for end, n in ends if n >= share * gained[-1]) for name, share in shares.items()}
    return found or None


def _event(name: str, payload: Json) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(payload) + b"\n\n"


def _put(unread: asyncio.Queue[bytes], event: bytes) -> None:
    if unread.full():
        unread.get_nowait()
    unread.put_nowait(event)
