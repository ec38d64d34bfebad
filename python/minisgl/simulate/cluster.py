"""A cluster on paper: replicas with the real planner, and a clock that jumps from event to event, in seconds."""

import heapq
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from minisgl.benchmark.metrics import Record
from minisgl.cluster.router import Placed, PrefixRouter, Prompt, text_blocks, wanted_replicas
from minisgl.core import ReqOutput, SamplingParams, StepResult
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from minisgl.simulate.times import Served
from minisgl.simulate.workload import Request, Session

_LOOK_SECONDS = 30.0  # from one look at all replicas to the next, until when new ones have started


@dataclass(slots=True)
class Flow:
    """A request on its way, and its session's later ones. arrived: when its client sent it; first, last: when its first
    token came, and its newest one. load: what it adds to its replica's, in tokens."""

    request: Request
    later: Session
    arrived: float
    token_ids: list[int]
    placed: Placed
    first: float = -1.0
    last: float = -1.0


class Replica:
    """One server: the scheduler's loop (`Scheduler.turn`) around a planner, with steps that only take time.

    inbox: what has come since the last turn. flows: what has not ended, by uid. steps: that run, with their ends.
    ended: when the last one did, of a replica that is to take nothing more; 0: it serves.
    """

    def __init__(self, name: str, served: Served, started: float) -> None:
        self.name, self.started, self.ended = name, started, 0.0
        self.planner = Planner(served.config)
        self.planner.pages.cache.changes = deque()
        self.inbox, self.flows = list[Flow](), dict[int, Flow]()
        self._served, self._free_at, self._uids = served, 0.0, count()
        self.steps: deque[tuple[float, Planned]] = deque()

    def turn(self, now: float) -> float | None:
        """Take in what has come, plan, and submit. Returns when the step ends that is to be retired; None: it idles."""
        while True:
            for flow, uid in zip(self.inbox, self._uids, strict=False):
                params = SamplingParams(flow.request.output_len, seed=0, ignore_eos=True)
                failed = self.planner.add(uid, flow.token_ids, params)
                assert not failed, failed[0].error
                self.flows[uid] = flow
            self.inbox.clear()
            planned = self.planner.plan()
            if planned is not None:
                self._free_at = max(now, self._free_at) + self._served.seconds(planned.plan)
                self.steps.append((self._free_at, planned))
            if len(self.steps) > int(self._served.config.overlap and planned is not None):
                return max(now, self.steps[0][0])
            if planned is None:
                return None

    def retire(self) -> list[ReqOutput]:
        """The oldest step has run: whoever samples in it has one token more of its answer."""
        _, planned = self.steps.popleft()
        sampled: list[tuple[int, ...]] = [(self.flows[req.uid].request.answer,) for req in planned.sampling]
        return self.planner.retire(StepResult(planned.plan.step_id, sampled))


class Simulation:
    """Replicas behind a router.

    autoscale: there is one replica at first, `num_replicas` at most.
    records: what became of each request; itl: all times between two tokens of one. duration: until the
    last token. routing: what the router took, here and now, for all requests.
    """

    def __init__(self, served: Served, num_replicas: int, policy: str, seed: int = 0, autoscale: bool = False) -> None:
        self.records, self.itl, self.replicas = list[Record](), array("d"), list[Replica]()
        self.duration, self.routing = 0.0, 0.0
        self._served, self._num_replicas = served, num_replicas
        self._router = PrefixRouter(policy, seed)
        self._router.bytes_per_token = np.dtype(np.int32).itemsize  # a prompt's text is that of its ids
        self._serving: dict[str, Replica] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._serial = count()
        self._start(1 if autoscale else num_replicas, 0.0)
        if autoscale:
            self._at(0.0, partial(self._scale, 0))

    def run(self, sessions: Sequence[Session]) -> None:
        """Serve them all, each turn after the one before."""
        for session in sessions:
            self._at(session[0].time, partial(self._arrive, session))
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)

    def _at(self, moment: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._serial), happen))

    def _start(self, num_replicas: int, now: float) -> None:
        for _ in range(num_replicas):
            self.replicas.append(Replica(f"{len(self.replicas)}", self._served, now))
            self._serving[self.replicas[-1].name] = self.replicas[-1]
        self._router.set_replicas(self._serving)

    def _scale(self, missing: int, now: float) -> None:
        """Those that are missing are there at the next look; of those that are too many, one gets no more requests."""
        self._start(missing, now)
        num_pages = self._served.config.num_pages
        in_use = sum(1 - replica.planner.pages.num_free / num_pages for replica in self._serving.values())
        wanted = wanted_replicas(sum(self._router.loads.values()), in_use)
        if wanted < len(self._serving) > 1:
            self._serving.popitem()[1].ended = now
            self._router.set_replicas(self._serving)
        missing = max(0, min(wanted, self._num_replicas) - len(self._serving))
        if self._events:
            self._at(now + _LOOK_SECONDS, partial(self._scale, missing))

    def _arrive(self, session: Session, now: float) -> None:
        tokens, lengths = zip(*session[0].segments, strict=True)
        ids, router = np.repeat(np.array(tokens, np.int32), lengths), self._router
        prompt = Prompt(text_blocks(ids.tobytes()), ids.nbytes, session[0].place)
        begun = time.perf_counter()
        name = router.choose(prompt) or ""  # there always is one
        placed = router.place(name, prompt)
        self.routing += time.perf_counter() - begun
        flow = Flow(session[0], session[1:], now, ids.tolist(), placed)
        self._at(now + self._served.overhead, partial(self._receive, self._serving[name], flow))

    def _receive(self, replica: Replica, flow: Flow, now: float) -> None:
        replica.inbox.append(flow)
        if not replica.steps and len(replica.inbox) == 1:
            self._at(now, partial(self._turn, replica))  # with all that comes at this moment

    def _turn(self, replica: Replica, now: float) -> None:
        if (until := replica.turn(now)) is not None:
            self._at(until, partial(self._retire, replica))
        changes, page_size = replica.planner.pages.cache.changes, self._served.config.page_size
        self._router.forget(replica.name, page_size * sum(len(pages) for pages, ids, *_ in changes if ids is None))
        changes.clear()

    def _retire(self, replica: Replica, now: float) -> None:
        self.duration = now
        if replica.ended:
            replica.ended = now
        for output in replica.retire():
            flow = replica.flows[output.req.uid]
            if flow.first < 0:
                flow.first = now
                flow.placed.hold()
            else:
                self.itl.append(now - flow.last)
            flow.last = now
            if output.finish_reason is not None:
                self._finish(replica, flow, output)
        self._turn(replica, now)

    def _finish(self, replica: Replica, flow: Flow, output: ReqOutput) -> None:
        req, first, total = output.req, flow.first - flow.arrived, flow.last - flow.arrived
        del replica.flows[req.uid]
        flow.placed.hold(0.0)
        counts = req.prompt_len, len(req.tokens) - req.prompt_len, req.num_cached
        self.records.append(Record(flow.arrived, total, (first, total), *counts, has_gaps=False))
        if flow.later:
            self._at(flow.last + flow.later[0].time, partial(self._arrive, flow.later))
