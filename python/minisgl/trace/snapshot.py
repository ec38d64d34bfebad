"""A look at what the planner has now: its queues, the tree of the prefix cache, and whose the pages are; bounded."""

from itertools import islice
from typing import Any

import numpy as np

from minisgl.kvcache.radix import RadixNode
from minisgl.scheduler.planner import Planner

Json = dict[str, Any]
MAX_RUNNING, MAX_WAITING, MAX_NODES, MAX_CELLS = 256, 64, 256, 2048
FREE, CACHED, SHARED = -1, -2, -3  # owners of pages: nobody; the cache, which may evict them; requests have them too


def page_counts(planner: Planner) -> dict[str, int]:
    """Pages that are in use, cached but to be had, and free."""
    num_free, num_cached = planner.pages.allocator.num_free, planner.pages.cache.num_evictable
    return {"used": planner.config.num_pages - num_free - num_cached, "cached": num_cached, "free": num_free}


def look(planner: Planner, *, whole: bool) -> Json:
    """known: the uids of all requests. whole: with the prefix cache and the pages."""
    running = [
        {"uid": req.uid, "row": req.row, "num_prompt": req.prompt_len, "num_tokens": req.num_tokens}
        | {"pages": len(req.pages), "state": "prefill" if req.num_computed < req.prompt_len else "decode"}
        | ({"state": "grammar"} if req.held else {})
        for req in planner.running[:MAX_RUNNING]
    ]
    waiting = [
        {"uid": uid, "num_tokens": req.num_tokens, "retracted": req.started}
        for uid, req in islice(planner.waiting.items(), MAX_WAITING)
    ]
    counts = {"num_running": len(planner.running), "num_waiting": len(planner.waiting)}
    counts |= {"num_retracted": planner.num_retracted, "num_inflight": len(planner.inflight)}
    now: Json = {"running": running, "waiting": waiting, **counts, "pages": page_counts(planner)}
    return {**now, "known": [*planner.reqs], **({"tree": _tree(planner), "pool": _pool(planner)} if whole else {})}


def _tree(planner: Planner) -> Json:
    """Parents before children, the most recently used first. A node's id is its first page; the root's is -1."""
    told: list[Json] = []
    level: list[tuple[int, RadixNode]] = [(-1, planner.pages.cache.nodes()[0])]
    while level and len(told) < MAX_NODES:
        below = [(parent, child) for parent, node in level for child in node.children.values()]
        below.sort(key=lambda item: -item[1].stamp)
        for parent, node in below[: MAX_NODES - len(told)]:
            sizes = {"num_tokens": len(node.key), "num_pages": len(node.pages), "refs": node.num_locks}
            told.append({"id": node.pages[0], "parent": parent, **sizes, "stamp": node.stamp})
        level = [(node.pages[0], node) for _, node in below]
    return {"nodes": told, "truncated": bool(level)}


def _pool(planner: Planner) -> Json:
    """Whose each page is, as runs of equal owners."""
    owners = np.full(planner.config.num_pages, FREE, np.int64)
    for req in (*planner.running, *planner.leaving):
        owners[req.pages] = req.uid
    for node in planner.pages.cache.nodes():
        owners[node.pages] = SHARED if node.num_locks else CACHED
    per_cell = -(-len(owners) // MAX_CELLS)
    cells = owners[::per_cell]
    starts = np.flatnonzero(np.diff(cells, prepend=cells[0] - 1))
    runs = zip(cells[starts].tolist(), np.diff(starts, append=len(cells)).tolist(), strict=True)
    return {"num_pages": len(owners), "pages_per_cell": per_cell, "runs": [*runs]}
