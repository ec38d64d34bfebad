"""A cluster on paper: replicas with the real planner, and a clock that jumps from event to event, in seconds."""

import math
import sched
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from minisgl.benchmark.metrics import Record
from minisgl.cluster.router import RUNNING_TOKENS, PrefixRouter, Prompt, text_blocks, wanted_replicas
from minisgl.core import Req, SamplingParams, StepResult
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from minisgl.simulate.times import Served
from minisgl.simulate.workload import Session

_LOOK_SECONDS = 30.0  # from one look at all replicas to the next, until when new ones have started


@dataclass(slots=True)
class Flow:
    """A request on its way, the first of those left of its session. arrived: when its client sent it; first, last: when
    its first token came, and its newest one."""

    session: Session
    arrived: float
    hold: Callable[[float], None]  # of its replica's load
    first: float = -1.0
    last: float = -1.0


class Replica:
    """One server: the scheduler's loop (`Scheduler.turn`) around a planner, with steps that only take time.

    inbox: what has come since the last turn, with its tokens. flows: what has not ended, by uid. steps: that run, with
    their ends. ended: when the last one did; 0: it takes requests. door: until when its API is busy.
    """

    def __init__(self, name: str, served: Served, started: float) -> None:
        self.name, self.started, self.ended, self.door = name, started, 0.0, 0.0
        self.planner = Planner(served.config)
        self.planner.pages.cache.changes = deque()
        self.inbox, self.flows = list[tuple[Flow, list[int]]](), dict[int, Flow]()
        self.steps = deque[tuple[float, Planned]]()
        self._served, self._free_at, self._uids = served, 0.0, count()

    def turn(self, now: float) -> float | None:
        """Take in what has come, plan, and submit. Returns when the step ends that is to be retired; None: it idles."""
        for (flow, ids), uid in zip(self.inbox, self._uids, strict=False):
            failed = self.planner.add(uid, ids, SamplingParams(flow.session[0].output_len, seed=0, ignore_eos=True))
            assert not failed, failed[0].error
            self.flows[uid] = flow
        self.inbox.clear()
        while len(self.steps) <= self._served.config.overlap and (planned := self.planner.plan()) is not None:
            self._free_at = max(now, self._free_at) + self._served.seconds(planned.plan)
            self.steps.append((self._free_at, planned))
        return max(now, self.steps[0][0]) if self.steps else None

    def retire(self) -> Iterator[tuple[Req, Flow, bool]]:
        """The oldest step has run: whoever samples in it has one token more of its answer, and may have ended by it."""
        _, planned = self.steps.popleft()
        sampled: list[tuple[int, ...]] = [(self.flows[req.uid].session[0].answer,) for req in planned.sampling]
        for req, _, reason, *_ in self.planner.retire(StepResult(planned.plan.step_id, sampled)):
            yield req, self.flows[req.uid] if reason is None else self.flows.pop(req.uid), reason is not None


class Simulation:
    """Replicas behind a router. autoscale: there is one at first, `num_replicas` at most.

    records: what became of each request; itl: all times between two tokens of one. duration: until the last token.
    routing: what the router took, here and now, for all requests; took: what all of it did.
    """

    def __init__(self, served: Served, num_replicas: int, policy: str, seed: int = 0, autoscale: bool = False) -> None:
        self.records, self.itl, self.replicas = list[Record](), array("d"), list[Replica]()
        self.duration = self.routing = self.took = 0.0
        self._served, self._num_replicas, self._autoscale = served, num_replicas, autoscale
        self._router, self._serving = PrefixRouter(policy, seed), dict[str, Replica]()
        self._router.bytes_per_token = np.dtype(np.int32).itemsize  # a prompt's text is that of its ids
        self._events = sched.scheduler(lambda: math.inf, lambda _: None)  # it never waits; they are told their time
        self._events.enterabs(0.0, -1, self._scale, (1 if autoscale else num_replicas, 0.0))

    def run(self, sessions: Sequence[Session]) -> None:
        """Serve them all, each turn after the one before."""
        begun = time.perf_counter()
        for session in sessions:
            self._events.enterabs(session[0].time, 0, self._arrive, (session, session[0].time))
        self._events.run()
        self.took = time.perf_counter() - begun

    def _scale(self, missing: int, now: float) -> None:
        """Start those that are missing, with autoscaling at the next look. Of too many, one gets no more requests."""
        self.replicas += (fresh := [Replica(str(len(self.replicas) + i), self._served, now) for i in range(missing)])
        self._serving |= {replica.name: replica for replica in fresh}
        if self._autoscale:
            num_pages, later = self._served.config.num_pages, now + _LOOK_SECONDS
            in_use = sum(1 - replica.planner.pages.num_free / num_pages for replica in self._serving.values())
            wanted = wanted_replicas(sum(self._router.loads.values()), in_use)
            if wanted < len(self._serving) > 1:
                self._serving.popitem()[1].ended = now
            missing = max(0, min(wanted, self._num_replicas) - len(self._serving))
            if not self._events.empty():
                self._events.enterabs(later, 0, self._scale, (missing, later))
        self._router.set_replicas(self._serving)

    def _arrive(self, session: Session, now: float) -> None:
        ids = np.repeat(*np.array(session[0].segments, np.int32).T)
        prompt = Prompt(text_blocks(ids.tobytes()), ids.nbytes, session[0].session)
        begun = time.perf_counter()
        name = self._router.choose(prompt) or ""  # there always is one
        flow = Flow(session, now, self._router.place(name, prompt))
        self.routing += time.perf_counter() - begun
        replica = self._serving[name]
        replica.door = max(now, replica.door) + self._served.overhead
        self._events.enterabs(replica.door, 0, self._receive, (replica, (flow, ids.tolist()), replica.door))

    def _receive(self, replica: Replica, asked: tuple[Flow, list[int]], now: float) -> None:
        replica.inbox.append(asked)
        if not replica.steps and len(replica.inbox) == 1:
            self._events.enterabs(now, 1, self._turn, (replica, now))  # with all that comes at this moment

    def _turn(self, replica: Replica, now: float) -> None:
        if (until := replica.turn(now)) is not None:
            self._events.enterabs(until, 0, self._retire, (replica, until))
        changes, page_size = replica.planner.pages.cache.changes, self._served.config.page_size
        self._router.forget(replica.name, page_size * sum(len(pages) for pages, ids, *_ in changes if ids is None))
        changes.clear()

    def _retire(self, replica: Replica, now: float) -> None:
        self.duration, replica.ended = now, now if replica.ended else 0.0
        for req, flow, has_ended in replica.retire():
            if flow.first < 0:
                flow.first = now
                flow.hold(RUNNING_TOKENS)
            else:
                self.itl.append(now - flow.last)
            flow.last = now
            if has_ended:
                flow.hold(0.0)
                first, total = flow.first - flow.arrived, now - flow.arrived
                counts = req.prompt_len, len(req.tokens) - req.prompt_len, req.num_cached
                self.records.append(Record(flow.arrived, total, (first, total), *counts, has_gaps=False))
            if has_ended and (later := flow.session[1:]):
                self._events.enterabs(now + later[0].time, 0, self._arrive, (later, now + later[0].time))
        self._turn(replica, now)
