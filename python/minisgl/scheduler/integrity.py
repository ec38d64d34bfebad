"""A walk over all that a planner remembers, and how what contradicts itself becomes a file for `tools/replay.py`."""

import os
import tempfile
from collections import Counter
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from minisgl.core import Req, ReqState
from minisgl.env import cache_dir
from minisgl.errors import IntegrityError, require
from minisgl.kvcache.radix import PrefixCache, RadixNode
from minisgl.scheduler.planner import Planner


def check_integrity(planner: Planner) -> None:
    """Raises: IntegrityError naming what does not fit."""
    held, pages = planner.running + planner.leaving, planner.pages
    cached = pages.cache.check([req.handle for req in held])
    owners = [("nobody", pages.allocator.check()), ("the cache", cached)]
    shares = Counter(id(req) for _, reqs in planner.inflight for req in reqs)
    for req in held:
        _check_req(planner, req, shares[id(req)])
        owners.append((f"request {req.uid}", pages.private(req)))
    owned, num_pages = Counter(chain.from_iterable(some for _, some in owners)), planner.config.num_pages
    if len(owned) < sum(len(some) for _, some in owners):
        ((page, _),) = owned.most_common(1)
        names = [name for name, some in owners for other in some if other == page]
        raise IntegrityError(f"page {page} belongs to {' and to '.join(names)}")
    require(min(owned) >= 0 and max(owned) < num_pages, "a page has a number that there is not")
    require(len(owned) == num_pages, f"{num_pages - len(owned)} pages are lost")
    slots = sorted([*pages.free_slots, *(slot for slot in pages.snapshots.values() if slot >= 0)])
    are_cached = not pages.snapshots or pages.snapshots.keys() <= {*cached}
    require(slots == [*pages.slots] and are_cached, "snapshots are lost, shared or misplaced")
    near = chain.from_iterable(req.window_pages[req.num_behind :] for req in held)
    pages.windows.check(near, pages.allocator.free_list)
    rows = sorted([*pages.rows, *(req.row for req in held)])
    require(rows == list(range(planner.config.max_running_requests)), "rows are lost or shared")
    for uid, req in planner.waiting.items():
        begun = req.state is not ReqState.WAITING or req.row >= 0 or req.pages or req.handle or req.num_computed
        require(not begun and req.uid == uid and planner.reqs.get(uid) is req, f"request {uid} should not wait")
    num_running = sum(req.state is ReqState.RUNNING for req in held)
    require(len(planner.reqs) == len(planner.waiting) + num_running, "a request is in no queue, or in two")


def _check_req(planner: Planner, req: Req, num_inflight: int) -> None:
    """One that has a row: that its state, counts, pages and lock fit together."""
    runs, num_known, num_pages = req.state is ReqState.RUNNING, len(req.tokens), len(req.pages)
    computed = 0 <= req.num_computed <= num_pages * planner.config.page_size
    placed = runs == (planner.reqs.get(req.uid) is req) and req.state is not ReqState.WAITING
    counts = req.prompt_len <= num_known <= req.num_tokens <= min(req.max_len, num_known + num_inflight)
    cache = planner.pages.cache
    for holds, contradiction in (
        (placed, f"is {req.state.value}, and in the wrong place"),
        (computed and (not runs or req.num_computed <= req.num_tokens), "has computed beyond its pages"),
        (counts or not runs, f"has {req.num_tokens} tokens, {num_known} known"),
        (req.num_inflight == num_inflight, f"is in {num_inflight} steps, not {req.num_inflight}"),
        (cache.spells(req.namespace, req.handle, req.prefix), "holds a prefix of other tokens"),
        (len(req.window_pages) == num_pages * (planner.config.window > 0), "has other pages of windows"),
        (len(cache.path_pages(req.handle)) <= num_pages, "holds more of the cache than it has pages"),
    ):
        require(holds, f"request {req.uid} {contradiction}")


def dump(planner: object, reason: str) -> str:
    """The file's path, or why there is none. It has token ids of requests: nobody else can read it. Three are kept."""
    try:
        folder = cache_dir().parent / "dumps"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in sorted(folder.iterdir(), key=os.path.getmtime)[:-2]:
            old.unlink()
        handle, path = tempfile.mkstemp(".msgpack", "planner-", folder)
        with open(handle, "wb") as file:
            file.write(msgspec.msgpack.encode((reason, planner), enc_hook=_plain))
        return path
    except Exception as error:  # what contradicts itself may be in no order that can be written
        return f"none: {error}"


def _plain(value: Any) -> Any:
    """What msgspec does not know. Nodes are numbers, but where the cache has them all."""
    if isinstance(value, PrefixCache):
        nodes = value.nodes()
        return vars(value) | {"nodes": [[id(node), *(getattr(node, x) for x in node.__slots__)] for node in nodes]}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if callable(value):
        return repr(value)
    return id(value) if isinstance(value, RadixNode) else vars(value) if hasattr(value, "__dict__") else list(value)
