"""A look at what the planner has now: its queues, the tree of the prefix cache, and whose the pages are; bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minisgl.kvcache.radix import RadixNode
from minisgl.scheduler.planner import Planner

MAX_RUNNING, MAX_WAITING, MAX_NODES, MAX_CELLS = 256, 64, 256, 2048
FREE, CACHED, SHARED = -1, -2, -3  # owners of pages: nobody; the cache, which may evict them; requests have them too


def page_counts(planner: Planner) -> dict[str, int]:
    """Pages that are in use, cached but to be had, and free."""
    num_free, num_cached = planner.pages.allocator.num_free, planner.pages.cache.num_evictable
    return {"used": planner.config.num_pages - num_free - num_cached, "cached": num_cached, "free": num_free}


def look(planner: Planner, *, whole: bool) -> dict[str, Any]:
    """known: the uids of all requests, of which num_begun have output. whole: with the prefix cache and the pages."""
    queue = zip(range(MAX_WAITING), planner.waiting.items(), strict=False)
    now: dict[str, Any] = {
        "running": [
            {"uid": req.uid, "row": req.row, "num_prompt": req.prompt_len, "num_computed": req.num_computed}
            | {"num_tokens": req.num_tokens, "pages": len(req.pages)}
            | {"state": "grammar" if req.held else "prefill" if req.num_computed < req.prompt_len else "decode"}
            for req in planner.running[:MAX_RUNNING]
        ],
        "waiting": [
            {"uid": uid, "num_tokens": req.num_tokens, "ahead": ahead, "retracted": req.started}
            for ahead, (uid, req) in queue
        ],
        "num_running": len(planner.running),
        "num_waiting": len(planner.waiting),
        "num_retracted": planner.num_retracted,
        "num_inflight": len(planner.inflight),
        "pages": page_counts(planner),
        "known": [*planner.reqs],
        "num_begun": sum([len(req.tokens) > req.prompt_len for req in planner.reqs.values()]),
    }
    if whole:
        nodes = planner.pages.cache.nodes()
        now |= {"tree": _tree(nodes[0]), "pool": _pool(planner, nodes)}
    return now


def _tree(root: RadixNode) -> dict[str, Any]:
    """Parents before children, the most recently used first. A node's id is its first page; the root's is -1."""
    told: list[dict[str, int]] = []
    level = [(-1, root)]
    while level and len(told) < MAX_NODES:
        below = [(parent, child) for parent, node in level for child in node.children.values()]
        below.sort(key=lambda item: -item[1].stamp)
        for parent, node in below[: MAX_NODES - len(told)]:
            sizes = {"num_tokens": len(node.key), "num_pages": len(node.pages), "refs": node.num_locks}
            told.append({"id": node.pages[0], "parent": parent, **sizes, "stamp": node.stamp})
        level = [(node.pages[0], node) for _, node in below]
    return {"nodes": told, "truncated": bool(level)}


def _pool(planner: Planner, nodes: Sequence[RadixNode]) -> dict[str, Any]:
    """Whose each page is, as runs of equal owners."""
    owners = np.full(planner.config.num_pages, FREE, np.int64)
    for req in (*planner.running, *planner.leaving):
        owners[req.pages] = req.uid
    for node in nodes:
        owners[node.pages] = SHARED if node.num_locks else CACHED
    per_cell = -(-len(owners) // MAX_CELLS)
    cells = owners[::per_cell]
    starts = np.flatnonzero(np.diff(cells, prepend=cells[0] - 1))
    runs = zip(cells[starts].tolist(), np.diff(starts, append=len(cells)).tolist(), strict=True)
    return {"num_pages": len(owners), "pages_per_cell": per_cell, "runs": [*runs]}
