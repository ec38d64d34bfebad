"""Rebuild the planner that a dump is of, and walk it again: `python tools/replay.py DUMP`.

A scheduler writes a dump when what its planner remembers contradicts itself: the log names the file. This shows what
was found, what the same walk finds now, and how much there is in the queues. Exit status 1 when the walk finds nothing:
then the contradiction was in the engine's page tables, or in the very call that was interrupted.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Req, ReqState, SamplingParams
from minisgl.errors import IntegrityError
from minisgl.kvcache.pages import PageAllocator, Pages, WindowPages
from minisgl.kvcache.radix import PrefixCache, RadixNode
from minisgl.scheduler.integrity import check_integrity
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from minisgl.utils.fairness import FairQueue


def load(path: Path) -> tuple[str, Planner]:
    """What was found, and the planner as it was then."""
    reason, state = msgspec.msgpack.decode(path.read_bytes())
    config = msgspec.convert(state["config"], SchedulerConfig)
    nodes = _nodes(state["pages"]["cache"].pop("nodes"))
    reqs: dict[str, Req] = {}

    def req(described: dict[str, Any]) -> Req:
        """The same object for what is described in the same words: a request is in several places."""
        key = repr(described)
        if key not in reqs:
            types = {field.name: field.type for field in fields(Req)}
            made = {name: value for name, value in described.items() if name in types}
            made["params"] = msgspec.convert(described["params"], SamplingParams)
            made["prefix"] = np.array(described["prefix"], np.int32)
            made["state"] = ReqState(described["state"])
            made["handle"] = _node(nodes, described["handle"])
            reqs[key] = Req(**made)
        return reqs[key]

    planner = Planner(config)
    for name, value in state.items():
        if not hasattr(planner, name) or name in ("config", "_eos", "speculation"):
            continue
        if name == "reqs":
            value = {uid: req(described) for uid, described in value.items()}
        elif name == "waiting":
            queues = {client: queue.items() for client, queue in value["_queues"].items()}
            queued = {client: OrderedDict((uid, req(x)) for uid, x in queue) for client, queue in queues.items()}
            value = _filled(FairQueue(), value | {"_queues": queued})
        elif name in ("running", "leaving"):
            value = [req(described) for described in value]
        elif name == "inflight":
            value = deque(Planned(plan, [req(described) for described in reqs]) for plan, reqs in value)
        elif name == "pages":
            for owner in (value, value["windows"]):
                free = owner["allocator"]
                owner["allocator"] = _filled(PageAllocator(0), free | {"flags": bytearray(free["flags"])})
            value["windows"] = _filled(WindowPages(0, config.page_size, config.window), value["windows"])
            cache = value["cache"]
            cache["_root"] = _node(nodes, cache["_root"])
            cache["candidates"] = [(stamp, serial, _node(nodes, x)) for stamp, serial, x in cache["candidates"]]
            value = _filled(Pages(config), value | {"cache": _filled(PrefixCache(config.page_size), cache)})
        setattr(planner, name, value)
    return reason, planner


def _nodes(described: list[list[Any]]) -> dict[int, RadixNode]:
    """The prefix cache's nodes, by their numbers."""
    nodes = {number: RadixNode(b"", np.empty(0, np.int32), [], None, 0) for number, *_ in described}
    for number, *values in described:
        for name, value in zip(RadixNode.__slots__, values, strict=True):
            if name == "children":
                value = {key: _node(nodes, child) for key, child in value.items()}
            elif name == "parent":
                value = None if value is None else _node(nodes, value)
            elif name == "key":
                value = np.array(value, np.int32)
            setattr(nodes[number], name, value)
    return nodes


def _node(nodes: dict[int, RadixNode], number: int | None) -> RadixNode | None:
    """One that is not in the tree is a node of its own."""
    return None if number is None else nodes.get(number) or RadixNode(b"", np.empty(0, np.int32), [], None, 0)


def _filled(made: Any, values: dict[str, Any]) -> Any:
    for name, value in values.items():
        setattr(made, name, value)
    return made


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__)
        return 2
    reason, planner = load(Path(argv[1]))
    print(f"found then: {reason}")
    print(f"{len(planner.running)} running, {len(planner.waiting)} waiting, {planner.pages.num_free} pages to be had")
    try:
        check_integrity(planner)
    except IntegrityError as error:
        print(f"found now: {type(error).__name__}: {error}")
        return 0
    print("found now: nothing")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
