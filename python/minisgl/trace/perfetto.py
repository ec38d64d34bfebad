"""Requests and steps in the trace event format of Chrome, which ui.perfetto.dev opens. Its times are microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from minisgl.trace.recorder import Json

_PROCESSES = {"api": 1, "tokenizer": 2, "scheduler": 3, "engine": 4, "detokenizer": 5, "rows": 6}
SPANS = (  # of a request: what is done, where, and between which stages
    ("read and check", "api", "received", "validated"),
    ("tokenize", "tokenizer", "validated", "tokenized"),
    ("queue", "scheduler", "queued", "admitted"),
    ("detokenize", "detokenizer", "finished", "detokenized"),
    ("send", "api", "detokenized", "sent"),
)


def chart(requests: Sequence[Json], steps: Sequence[Json]) -> Json:
    """A track for each process, more where it does several things at once; one for each row; and arrows along each
    request."""
    names = {output["uid"]: request["id"] for request in requests for output in request["outputs"]}
    spans = chain.from_iterable(_of_output(output, names) for request in requests for output in request["outputs"])
    slices = [*_of_steps(steps, names), *_in_lanes(sorted(spans, key=lambda span: (span["ts"], -span["dur"])))]
    slices.sort(key=lambda event: event["ts"])
    heads = [_head("process_name", pid, 0, name) for name, pid in _PROCESSES.items()]
    for pid, tid in sorted({(event["pid"], event["tid"]) for event in slices}):
        heads.append(_head("thread_name", pid, tid, f"row {tid}" if pid == 6 else f"track {tid}"))
    return {"traceEvents": [*heads, *slices, *_arrows(slices)], "displayTimeUnit": "ms"}


def _head(kind: str, pid: int, tid: int, name: str) -> Json:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _slice(name: str, where: str, tid: int, begin: float, seconds: float, args: Json) -> Json:
    times = {"ts": int(1e6 * begin), "dur": max(1, int(1e6 * (begin + seconds)) - int(1e6 * begin))}
    return {"ph": "X", "name": name, "cat": where, "pid": _PROCESSES[where], "tid": tid, **times, "args": args}


def _of_steps(steps: Sequence[Json], names: dict[int, str]) -> list[Json]:
    """What the scheduler, the device and each row did in them; on the device one follows on the other."""
    slices, end = [], 0.0
    for step, after in zip(steps, [*steps[1:], {"time": float("inf")}], strict=True):
        about = {"step": step["step"], "tokens": step["num_tokens"], "pages": step["pages"]}
        busy = min((step["host_ms"] or 0.0) / 1e3, after["time"] - step["time"])
        slices.append(_slice("turn", "scheduler", 0, step["time"], busy, about))
        begin, seconds = max(step["time"], end), (step["device_ms"] or 0.0) / 1e3
        end = begin + max(seconds, 2e-6)
        slices.append(_slice("step", "engine", 0, begin, seconds, about))
        for row, uid, num_new, is_prefill in step["rows"]:
            kind, args = f"prefill {num_new}" if is_prefill else "decode", {"uid": uid, "id": names.get(uid)}
            slices.append(_slice(kind, "rows", row, begin, seconds, {**args, "step": step["step"]}))
    return slices


def _of_output(output: Json, names: dict[int, str]) -> list[Json]:
    times, args = {stage["name"]: stage["time"] for stage in output["stages"]}, {"uid": output["uid"]}
    return [
        _slice(name, where, 1, times[a], max(0.0, times[b] - times[a]), {**args, "id": names[output["uid"]]})
        for name, where, a, b in SPANS
        if times[a] and times[b]
    ]


def _in_lanes(spans: list[Json]) -> list[Json]:
    """On the first track of their process that is free then: those of one track must not overlap."""
    ends: dict[tuple[int, int], int] = {}
    for span in spans:
        while ends.get((span["pid"], span["tid"]), 0) > span["ts"]:
            span["tid"] += 1
        ends[span["pid"], span["tid"]] = span["ts"] + span["dur"]
    return spans


def _arrows(slices: Sequence[Json]) -> list[Json]:
    """From slice to slice of an output, but for what a row does between its first step and its last."""
    paths: dict[int, list[Json]] = {}
    for event in slices:
        if "uid" in event["args"]:
            path = paths.setdefault(event["args"]["uid"], [])
            if len(path) > 1 and path[-1]["pid"] == path[-2]["pid"] == event["pid"] == 6:
                path.pop()
            path.append(event)
    arrows = []
    for uid, path in paths.items():
        phases = ["s", *"t" * (len(path) - 2), "f"] if len(path) > 1 else []
        for phase, event in zip(phases, path, strict=False):
            at = {"pid": event["pid"], "tid": event["tid"], "ts": event["ts"], "bp": "e"}
            arrows.append({"ph": phase, "name": "request", "cat": "request", "id": uid, **at})
    return arrows
