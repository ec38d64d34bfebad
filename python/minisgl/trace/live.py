"""The live view: while somebody looks, rank 0 is asked a few times a second, and all who look are told the same."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import orjson

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.errors import MiniSGLError, RequestError
from minisgl.message.messages import Histogram
from minisgl.trace.journal import Journal
from minisgl.trace.recorder import Json, Recorded

INTERVAL = 0.25  # seconds
MAX_VIEWERS = 8
MAX_STEPS, MAX_HELD = 64, 64  # in one event
MAX_DELAY_MS = 2000
PACE_SECONDS = 60.0  # that slow motion lasts, unless it is asked for again
WINDOW = 8  # events that rates and percentiles are of

Ask = Callable[..., Awaitable[Recorded]]  # rank 0, with fields of a `TraceMsg`


@dataclass(slots=True)
class _Pace:
    """Slow motion: whose wish it is, and when it ends."""

    viewer: str | None = None
    delay_ms: int = 0
    paused: bool = False
    end: float = 0.0


class Live:
    """Owns the viewers, and the pace that one of them has set. metrics: what the API server counts."""

    def __init__(self, ask: Ask, journal: Journal, metrics: Any, config: ServerConfig) -> None:
        self._ask, self._journal, self._metrics, self._config = ask, journal, metrics, config
        self.may_slow = config.slow_motion or bool(config.access.api_keys or config.access.admin_keys)
        self._viewers: set[str] = set()
        self._pace = _Pace()

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
        self._pace = _Pace(viewer, delay_ms, paused, time.monotonic() + PACE_SECONDS)
        return {"delay_ms": delay_ms, "paused": paused, "seconds": PACE_SECONDS}

    async def events(self) -> AsyncIterator[bytes]:
        """For one viewer, as long as both sides are there."""
        viewer, view = secrets.token_hex(8), _View(self._metrics)
        self._viewers.add(viewer)
        try:
            yield _event("hello", self._hello(viewer))
            while True:
                for name, payload in (await self._look(view)).items():
                    if view.is_new(name, payload):
                        yield _event(name, payload)
                await asyncio.sleep(INTERVAL)
        except MiniSGLError as error:
            yield _event("gone", {"error": str(error)})
        finally:
            self._viewers.discard(viewer)
            if self._pace.viewer == viewer:
                self._pace = _Pace()

    async def _look(self, view: _View) -> dict[str, Json]:
        if time.monotonic() > self._pace.end:
            self._pace = _Pace()
        pace, view.number = self._pace, view.number + 1
        asked = {"since": view.since, "num_steps": MAX_STEPS, "delay": pace.delay_ms / 1e3, "paused": pace.paused}
        recorded = await self._ask(view=1 + view.number % 2, **asked)
        now = recorded.now
        assert now is not None
        events: dict[str, Json] = {name: now.pop(name) for name in ("tree", "pool") if name in now}
        if "tree" in events:
            view.compare(events["tree"])
        if recorded.steps:  # the last two come again, when their times are known
            last = recorded.steps[-1]
            view.since = last["step"] + (1 if last["device_ms"] is not None else -1)
        shown = {"delay_ms": pace.delay_ms, "paused": pace.paused, "viewer": pace.viewer}
        counters = {"in_flight": len(self._journal.open), **view.counters()}
        head = {"time": time.time(), "steps": recorded.steps, "pace": shown, "counters": counters}
        return {"state": {**head, **self._queues(now)}, **events}

    def _queues(self, now: Json) -> Json:
        """What rank 0 sees, with the names of requests and with those that are elsewhere."""
        known, begun, opened = frozenset(now.pop("known")), now.pop("num_begun"), self._journal.open
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

    def _hello(self, viewer: str) -> Json:
        config, plan = self._config, self._config.scheduler
        limits: Json = {"rows": plan.max_running_requests, "budget": plan.max_prefill_length, "overlap": plan.overlap}
        limits |= {"pages": plan.num_pages or None, "page_size": plan.page_size, "policy": plan.schedule_policy}
        limits |= {"cache": plan.cache_type, "ranks": config.engine.tp_size, "tokenizers": config.num_tokenizer}
        about = {"viewer": viewer, "version": minisgl.__version__, "model": config.served_model_name}
        pace = {"allowed": self.may_slow, "max_delay_ms": MAX_DELAY_MS}
        return {**about, "interval_ms": int(1e3 * INTERVAL), "limits": limits, "pace": pace}


class _View:
    """What one viewer has been told already."""

    def __init__(self, metrics: Any) -> None:
        self._metrics = metrics
        self.number = self.since = self._stamp = 0
        self._ids: frozenset[int] = frozenset()  # of the tree
        self._last: dict[str, Json] = {}  # events by their names
        self._window: deque[tuple[float, int, int, list[int], list[int]]] = deque(maxlen=WINDOW)

    def is_new(self, name: str, payload: Json) -> bool:
        """Whether it is not what this event said last."""
        before, self._last[name] = self._last.get(name), payload
        return payload != before

    def compare(self, tree: Json) -> None:
        """Tell of each node whether it was used since the event before, and which are gone."""
        before, stamp, ids = self._stamp, self._stamp, frozenset(node["id"] for node in tree["nodes"])
        for node in tree["nodes"]:
            stamp = max(stamp, node["stamp"])
            node["hit"] = node.pop("stamp") > before
        self._stamp, tree["evicted"], self._ids = stamp, sorted(self._ids - ids), ids

    def counters(self) -> Json:
        """Rates and percentiles of the last events."""
        metrics = self._metrics
        ttft, itl, num_output = metrics.time_to_first_token, metrics.inter_token_latency, metrics.num_output
        now, num_ended = time.monotonic(), sum(metrics.num_finished.values())
        self._window.append((now, num_output, num_ended, [*ttft.counts], [*itl.counts]))
        since, output, ended, first, later = self._window[0]
        seconds = max(now - since, 1e-9)
        rates = {"tokens_per_s": (num_output - output) / seconds, "requests_per_s": (num_ended - ended) / seconds}
        return {**rates, "ttft_ms": _percentiles(ttft, first), "itl_ms": _percentiles(itl, later)}


def _percentiles(histogram: Histogram, before: list[int]) -> Json | None:
    """Of what a histogram of seconds has gained, in ms: the upper bounds of the buckets that they lie in."""
    gained = [*accumulate(after - count for after, count in zip(histogram.counts, before, strict=True))]
    ends = [*zip((*histogram.bounds, histogram.bounds[-1]), gained, strict=True)]
    shares = {"p50": 0.5, "p95": 0.95} if gained[-1] else {}
    found = {name: next(1e3 * end for end, n in ends if n >= share * gained[-1]) for name, share in shares.items()}
    return found or None


def _event(name: str, payload: Json) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(payload) + b"\n\n"
