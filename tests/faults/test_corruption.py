"""Twenty and more ways in which a planner's memory can go wrong: the walk names each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Req, ReqState, SamplingParams
from minisgl.errors import IntegrityError
from minisgl.kvcache.radix import RadixNode
from minisgl.scheduler.integrity import check_integrity
from minisgl.scheduler.planner import Planner
from tests.simulator import SimulatedEngine

CONFIG = SchedulerConfig(
    max_running_requests=4, max_prefill_length=64, max_seq_len=96, num_pages=96, page_size=4, schedule_policy="fcfs"
)


class Busy:
    """A planner with requests in every state: two that share a prefix run, one leaves, others wait, and a step is in
    flight. The cache has what earlier requests left, in two namespaces."""

    def __init__(self) -> None:
        self.planner = Planner(CONFIG)
        self.engine = SimulatedEngine(CONFIG)
        for uid, first in enumerate((7, 7, 20)):
            self.planner.add(uid, [first] * 9 + [uid] * 8, SamplingParams(max_tokens=1, seed=0))
        self.planner.add(3, [7] * 9 + [1] * 8, SamplingParams(max_tokens=1, seed=0, cache_salt="another"))
        while not self.planner.is_idle:
            self.retire(self.step())
        for uid in range(10, 14):
            prompt = [7] * 9 + [uid] * 6
            self.planner.add(uid, prompt, SamplingParams(max_tokens=40, seed=0, ignore_eos=True))
        for uid in range(20, 23):
            self.planner.add(uid, [uid] * 30, SamplingParams(max_tokens=8, seed=0))
        for _ in range(4):
            self.retire(self.step())
        self.inflight = self.step()
        self.planner.abort(13)
        check_integrity(self.planner)
        self.cache, self.allocator = self.planner.pages.cache, self.planner.pages.allocator
        self.running, self.waiting = self.planner.running, [req for _, req in self.planner.waiting.items()]
        (self.leaving,) = self.planner.leaving
        assert (len(self.running), len(self.waiting)) == (3, 3)

    def step(self) -> Any:
        planned = self.planner.plan()
        assert planned is not None
        return self.engine.submit(planned.plan)

    def retire(self, handle: Any) -> None:
        self.planner.retire(handle.result())

    def nodes(self) -> list[RadixNode]:
        """All but the root."""
        return self.cache.nodes()[1:]

    def leaf(self) -> RadixNode:
        return next(node for node in self.nodes() if not node.children and not node.num_locks)

    def deep(self) -> RadixNode:
        """A node below another one."""
        return next(node for node in self.nodes() if node.parent is not self.cache.nodes()[0])


def set_node(name: str, change: Callable[[Any], Any]) -> Callable[[Busy], None]:
    def corrupt(busy: Busy) -> None:
        node = busy.leaf()
        setattr(node, name, change(getattr(node, name)))

    return corrupt


def set_req(name: str, change: Callable[[Any], Any], which: str = "running") -> Callable[[Busy], None]:
    def corrupt(busy: Busy) -> None:
        req: Req = busy.leaving if which == "leaving" else getattr(busy, which)[0]
        setattr(req, name, change(getattr(req, name)))

    return corrupt


def freed_in_use(busy: Busy) -> None:
    busy.allocator.free([busy.running[0].pages[-1]])


def freed_in_cache(busy: Busy) -> None:
    busy.allocator.free([busy.leaf().pages[0]])


def in_two_requests(busy: Busy) -> None:
    lost = busy.running[1].pages[-1]
    busy.running[1].pages[-1] = busy.running[0].pages[-1]
    busy.allocator.free([lost])


def twice_in_one_request(busy: Busy) -> None:
    busy.running[0].pages.append(busy.running[0].pages[-1])


def filed_elsewhere(busy: Busy) -> None:
    parent = busy.leaf().parent
    assert parent is not None
    name, child = parent.children.popitem()
    parent.children[bytes(len(name))] = child


def another_parent(busy: Busy) -> None:
    busy.deep().parent = busy.cache.nodes()[0]


def own_ancestor(busy: Busy) -> None:
    node = busy.deep()
    assert node.parent is not None
    node.children[node.parent.name] = node.parent


def in_another_namespace(busy: Busy) -> None:
    """A request of one salt on the same tokens of another."""
    theirs = next(node for node in busy.nodes() if node.name.endswith(b"another"))
    ours = next(node for node in busy.nodes() if node.name == theirs.name.removesuffix(b"another"))
    root = busy.cache.nodes()[0]
    for node, name in ((theirs, ours.name), (ours, theirs.name)):
        node.name, root.children[name] = name, node


def stale_handle(busy: Busy) -> None:
    req = busy.running[0]
    old = req.handle
    req.handle = RadixNode(old.name, old.key, old.pages, old.parent, old.stamp)


def unlocked(busy: Busy) -> None:
    busy.cache.unlock(busy.running[0].handle)


def heap_forgets(busy: Busy) -> None:
    busy.cache.candidates = [entry for entry in busy.cache.candidates if entry[2] is not busy.leaf()]


def heap_has_another_stamp(busy: Busy) -> None:
    busy.leaf().stamp += 1


def count_in_cache(busy: Busy) -> None:
    """It holds a page that it does not know of."""
    leaf = busy.leaf()
    leaf.key, leaf.pages = np.append(leaf.key, leaf.key[:4]), leaf.pages + busy.allocator.allocate(1)


def count_evictable(busy: Busy) -> None:
    busy.cache.num_evictable -= 1


def row_twice(busy: Busy) -> None:
    busy.running[0].row = busy.running[1].row


def row_lost(busy: Busy) -> None:
    busy.planner.pages.rows += [0]


def waits_and_runs(busy: Busy) -> None:
    busy.planner.waiting.put("", busy.running[0].uid, busy.running[0])


def runs_twice(busy: Busy) -> None:
    busy.running.append(busy.running[0])


def in_no_queue(busy: Busy) -> None:
    busy.planner.waiting.remove("", busy.waiting[0].uid)


def forgotten(busy: Busy) -> None:
    del busy.planner.reqs[busy.running[0].uid]


def finished_and_known(busy: Busy) -> None:
    busy.planner.reqs[busy.leaving.uid] = busy.leaving


def waits_under_another_uid(busy: Busy) -> None:
    busy.planner.waiting.remove("", busy.waiting[0].uid)
    busy.planner.waiting.put("", 99, busy.waiting[0])


def flag(busy: Busy) -> None:
    busy.allocator.flags[busy.running[0].pages[-1]] = 1


def free_list(busy: Busy) -> None:
    busy.allocator.free_list[0] = busy.running[0].pages[-1]


VARIANTS: dict[str, tuple[Callable[[Busy], object], str]] = {
    "a page in use is freed": (freed_in_use, "page .* belongs to"),
    "a cached page is freed": (freed_in_cache, "page .* belongs to"),
    "a page is lost": (lambda busy: busy.allocator.allocate(1), "1 pages are lost"),
    "a request loses a page": (lambda busy: busy.running[0].pages.pop(), "computed beyond|lost"),
    "a page in two requests": (in_two_requests, "page .* belongs to request 1. and to request 1."),
    "a page twice in one": (twice_in_one_request, "page .* belongs to request 1. and to request 1."),
    "a page id out of range": (lambda busy: busy.running[0].pages.__setitem__(-1, 4000), "number that there is not"),
    "a negative page id": (lambda busy: busy.running[0].pages.__setitem__(-1, -1), "number that there is not"),
    "a flag of a page": (flag, "flags"),
    "the free list": (free_list, "flags"),
    "a lock too many": (set_node("num_locks", lambda locks: locks + 1), "locked more or less"),
    "a lock too few": (unlocked, "locked more or less"),
    "a negative lock": (set_node("num_locks", lambda locks: -1), "locked more or less"),
    "evictable pages": (count_evictable, "evictable pages"),
    "pages of the cache": (count_in_cache, "pages in the cache"),
    "a stale handle": (stale_handle, "not in the cache"),
    "a key longer than its pages": (set_node("key", lambda key: np.append(key, key)), "differ in length"),
    "pages beyond their key": (set_node("pages", lambda pages: [*pages, pages[0]]), "differ in length"),
    "a child under another name": (filed_elsewhere, "another name"),
    "a node that names itself otherwise": (set_node("name", lambda name: name + b"x"), "another name"),
    "other tokens in a key": (set_node("key", lambda key: key + 1), "another name"),
    "a wrong parent": (another_parent, "know its parent"),
    "a node above itself": (own_ancestor, "know its parent|more nodes"),
    "two namespaces mixed up": (in_another_namespace, "prefix of other tokens"),
    "a prefix of other tokens": (set_req("prefix", lambda prefix: prefix + 1), "prefix of other tokens"),
    "the heap forgets a leaf": (heap_forgets, "never be evicted"),
    "the heap has another stamp": (heap_has_another_stamp, "never be evicted"),
    "a row twice": (row_twice, "rows are lost or shared"),
    "a row that is nobody's too": (row_lost, "rows are lost or shared"),
    "waiting and running at once": (waits_and_runs, "should not wait"),
    "running twice": (runs_twice, "belongs to request|locked more"),
    "in no queue": (in_no_queue, "in no queue"),
    "running and unknown": (forgotten, "wrong place"),
    "finished and still known": (finished_and_known, "wrong place"),
    "finished and still waiting": (set_req("state", lambda state: ReqState.FINISHED, "waiting"), "should not wait"),
    "waiting under another uid": (waits_under_another_uid, "should not wait"),
    "waiting with pages": (set_req("pages", lambda pages: [1], "waiting"), "should not wait"),
    "waiting and half computed": (set_req("num_computed", lambda count: 4, "waiting"), "should not wait"),
    "a position beyond the pages": (set_req("num_computed", lambda count: 95), "computed beyond"),
    "a negative count": (set_req("num_computed", lambda count: -1), "computed beyond"),
    "more tokens than are known": (set_req("num_tokens", lambda count: count + 5), "tokens, .* known"),
    "a token that nobody planned": (lambda busy: busy.running[0].tokens.extend([1, 2]), "tokens, .* known"),
    "a step too many": (set_req("num_inflight", lambda count: count + 1), "steps, not"),
    "a step too few": (set_req("num_inflight", lambda count: 0, "leaving"), "steps, not"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_planted_corruption_is_found_by_the_walk(name: str) -> None:
    busy = Busy()
    corrupt, found = VARIANTS[name]
    corrupt(busy)
    with pytest.raises(IntegrityError, match=found):
        check_integrity(busy.planner)
