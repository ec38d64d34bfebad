"""What rank 0 remembers of requests and steps, on a device that computes nothing; and the chart made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import SamplingParams
from minisgl.message.messages import AbortMsg, TraceMsg, UserMsg, pack_ids
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport
from minisgl.trace import recorder as module
from minisgl.trace.journal import Entry, Output, story
from minisgl.trace.perfetto import chart
from minisgl.trace.recorder import Record, Recorded, Recorder, decode_recorded
from minisgl.trace.routes import stages
from tests.simulator import SimulatedEngine

CONFIG = SchedulerConfig(
    max_running_requests=4, max_prefill_length=16, max_seq_len=128, num_pages=64, page_size=4, check_integrity=1
)


class World:
    """A scheduler that is watched, and whose clock ticks once at each look."""

    def __init__(self, **changes: Any) -> None:
        config = replace(CONFIG, **changes)
        self.now = 1000.0
        self.recorder, self.transport = Recorder(self._tick), LocalTransport()
        self.scheduler = Scheduler(config, SimulatedEngine(config), self.transport, self.recorder)

    def _tick(self) -> float:
        self.now += 0.001
        return self.now

    def put(self, uid: int, size: int, max_tokens: int = 5, **more: Any) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True, **more)
        prompt = pack_ids([(uid * 37 + i) % 40 for i in range(size)])
        self.transport.put([UserMsg(uid, prompt, params, tokenized=self.now)])

    def run(self, turns: int = 200) -> None:
        for _ in range(turns):
            self.scheduler.turn()

    def ask(self, *uids: int, **wanted: Any) -> Recorded:
        return decode_recorded(self.recorder.reply(TraceMsg(1, uids, **wanted)).data)

    def of(self, uid: int) -> Record:
        return self.ask(uid).requests[0]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_prompt_is_seen_chunk_by_chunk_and_its_end(overlap: bool) -> None:
    world = World(overlap=overlap)
    world.put(7, 40)
    world.run()
    record = world.of(7)
    assert [(chunk["start"], chunk["num_new"]) for chunk in record.chunks] == [(0, 16), (16, 16), (32, 8)]
    assert (record.num_chunks, record.num_prompt, record.num_output, record.reason) == (3, 40, 5, "length")
    (admission,) = record.admissions
    assert record.tokenized < record.queued < admission["time"] <= record.chunks[0]["time"] < record.finished
    steps = world.ask(num_steps=100).steps
    assert [step["num_tokens"] for step in steps] == [16, 16, 8, 1, 1, 1, 1]
    assert [row for step in steps for row in step["rows"]][2:4] == [[0, 7, 8, 1], [0, 7, 1, 0]]
    assert all(step["host_ms"] > 0 and step["device_ms"] > 0 for step in steps)
    assert all(sum(step["pages"].values()) == CONFIG.num_pages for step in steps)


def test_what_the_prefix_cache_gave_is_told() -> None:
    world = World()
    world.put(1, 40)
    world.run()
    world.transport.put([UserMsg(2, pack_ids([37 + i for i in range(3)]), SamplingParams(max_tokens=2, seed=0))])
    prompt = pack_ids([(37 + i) % 40 for i in range(40)])
    world.transport.put([UserMsg(3, prompt, SamplingParams(max_tokens=2, seed=0, ignore_eos=True))])
    world.run()
    assert world.of(2).admissions[0]["num_cached"] == 0
    assert world.of(3).admissions[0]["num_cached"] == 36  # whole pages, and one token is left to compute
    seen = world.ask(view=2).now
    assert seen is not None and seen["tree"]["nodes"]
    assert sum(node["num_pages"] for node in seen["tree"]["nodes"]) == seen["pages"]["cached"]


def test_a_retraction_is_seen_and_what_comes_after_it() -> None:
    world = World(num_pages=32, max_seq_len=128)
    for uid in range(1, 5):
        world.put(uid, 8, 60)
    world.run(600)
    records = world.ask(1, 2, 3, 4).requests
    assert sum(record.num_retractions for record in records) == world.scheduler.planner.num_retracted > 0
    for record in records:
        assert len(record.admissions) == 1 + len(record.retractions)
        events = [(event["time"], "admissions") for event in record.admissions]
        events += [(event["time"], "retractions") for event in record.retractions]
        kinds = ["admissions", *["retractions", "admissions"] * len(record.retractions)]
        assert [kind for _, kind in sorted(events)] == kinds
        assert all(8 <= event["num_computed"] < 68 for event in record.retractions)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_running_requests": 1}, "rows"),
        ({"num_pages": 32, "max_seq_len": 128}, "pages"),
        ({}, "budget"),
    ],
)
def test_why_a_request_waits_is_told_now_and_later(changes: dict[str, int], why: str) -> None:
    world = World(**changes)
    world.put(1, 100 if why == "pages" else 60, 5)
    world.put(2, 60, 5)
    world.run({"budget": 2, "rows": 6, "pages": 9}[why])
    seen = world.ask(view=1).now
    assert seen is not None
    (waiting,) = seen["waiting"]
    assert (waiting["uid"], waiting["why"], waiting["ahead"], waiting["retracted"]) == (2, why, 0, False)
    assert waiting["seconds"] > 0
    world.run()
    record = world.of(2)
    assert max(record.waited, key=record.waited.__getitem__) in (why, "budget")
    assert record.waited[why] > 0
    first, last = record.admissions[0]["time"], record.queued
    assert sum(record.waited.values()) == pytest.approx(first - last, abs=0.01)
    assert world.of(1).waited == {"budget": 0, "pages": 0, "rows": 0}


def test_who_waits_while_no_step_can_be_planned_waits_for_pages() -> None:
    world = World()
    world.scheduler.planner.add(5, [1, 2, 3], SamplingParams(max_tokens=4, seed=0))
    seen = world.ask(view=1).now
    assert seen is not None
    (waiting,) = seen["waiting"]
    assert (waiting["uid"], waiting["why"]) == (5, "pages")


def test_whom_the_policy_lets_wait_is_told() -> None:
    world = World(max_running_requests=1, schedule_policy="priority")
    world.put(1, 8, 20)
    world.run(3)
    world.put(2, 8, 5, priority=5)
    world.run(2)
    for uid in (3, 4):
        world.put(uid, 8, 5, priority=1)
    world.run(26)
    seen = world.ask(view=1).now
    assert seen is not None
    assert {waiting["uid"]: waiting["why"] for waiting in seen["waiting"]}[2] == "policy"
    world.run()
    assert [world.of(uid).overtaken for uid in (1, 2, 3, 4)] == [0, 2, 0, 0]


def test_all_that_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 10)
    monkeypatch.setattr(module, "MAX_EVENTS", 4)
    world = World(max_prefill_length=4)
    for uid in range(30):
        world.put(uid, 40, 60)
        world.run(90)
    world.transport.put([UserMsg(99, pack_ids([]), SamplingParams(max_tokens=1, seed=0))])
    world.put(100, 8)
    world.transport.put([AbortMsg(100), AbortMsg(3)])
    world.run(5)
    known = world.ask(*range(101)).requests
    assert [record.uid for record in known] == [*range(22, 30), 99, 100]
    assert [record.reason for record in known][-3:] == ["length", "error", "abort"]
    for record in known[:-2]:
        assert (len(record.chunks), record.num_chunks) == (4, 10)
        assert 2 <= len(record.decodes) <= 4
    assert len(world.ask(num_steps=5000).steps) <= module.MAX_STEPS
    last = world.ask(num_steps=1).steps[0]["step"]
    assert [step["step"] for step in world.ask(since=last - 1, num_steps=5000).steps] == [last - 1, last]
    assert not world.ask().steps


def test_a_uid_that_is_in_use_hurts_nobody() -> None:
    world = World()
    world.put(1, 8, 20)
    world.run(3)
    world.put(1, 8, 20)
    world.run()
    assert world.scheduler.planner.is_idle


def test_the_pool_tells_whose_each_page_is() -> None:
    world = World()
    world.put(1, 20, 40)
    world.put(2, 20, 40)
    world.run(6)
    seen = world.ask(view=2).now
    assert seen is not None
    pool, planner = seen["pool"], world.scheduler.planner
    owners = [owner for owner, count in pool["runs"] for _ in range(count)]
    assert len(owners) == pool["num_pages"] == CONFIG.num_pages
    found = Counter(owners)
    assert found[-1] == planner.pages.allocator.num_free
    for req in planner.running:
        assert found[req.uid] == len(planner.pages.private(req))
    assert found[-3] == sum(node["num_pages"] for node in seen["tree"]["nodes"]) > 0


def test_slow_motion_ends_when_nobody_views_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.0)
    world = World()
    world.put(1, 8, 100)
    world.run(2)
    world.ask(view=1, paused=True)
    before = world.now
    world.run(1)
    assert world.now - before >= module.LAPSE_SECONDS
    world.ask(view=1, delay=0.5)
    before = world.now
    world.run(1)
    assert 0.5 <= world.now - before < 1
    world.ask(view=1)
    before = world.now
    world.run(1)
    assert world.now - before < 0.1


def _told(world: World, *uids: int) -> tuple[list[Any], list[Any]]:
    recorded = world.ask(*uids, num_steps=500)
    found = []
    for record in recorded.requests:
        texts = record.queued + 0.1, record.finished + 0.01
        output = Output(record.uid, False, record.finished + 0.02, texts, 5, "stop")
        entry = Entry(record.queued - 0.5, {}, (f"r{record.uid}", "c", ""), record.queued - 0.4, record.finished + 0.1)
        entry.outputs[0] = output
        found.append(story(entry, {record.uid: record}))
    return found, recorded.steps


def test_the_chart_keeps_the_rules_of_the_trace_event_format() -> None:
    """Those of "Trace Event Format" (Google, 2016) that we use: complete events nest on their track, metadata names
    processes and threads, a flow begins and ends once, in order, and each of its points is inside of a slice."""
    world = World()
    for uid in range(1, 9):
        world.put(uid, 5 * uid, 12)
    world.run()
    told = _told(world, *range(1, 9))
    document = chart(*told)
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "s", "t", "f"}
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["ts"], int)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["dur"] > 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert named == set(tracks)
    assert {event["pid"] for event in events if event["name"] == "process_name"} >= {pid for pid, _ in tracks}
    for spans in tracks.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    flows: dict[int, list[Any]] = {}
    for event in events:
        if event["ph"] in "stf":
            flows.setdefault(event["id"], []).append(event)
            assert any(begin <= event["ts"] < end for begin, end in tracks[event["pid"], event["tid"]])
    assert set(flows) == set(range(1, 9))
    for flow in flows.values():
        assert [event["ph"] for event in flow] == ["s", *["t"] * (len(flow) - 2), "f"]
        assert [event["ts"] for event in flow] == sorted(event["ts"] for event in flow)
    rows = {tid for pid, tid in tracks if pid == 6}
    assert rows == {row[0] for step in told[1] for row in step["rows"]}
    decodes = [event for event in events if event["ph"] == "X" and event["pid"] == 6]
    assert len(decodes) == sum(len(step["rows"]) for step in told[1])


def test_a_story_of_what_has_hardly_begun_has_all_stages() -> None:
    entry = Entry(1.0, {}, ("a", "b", "c"), 2.0)
    entry.outputs[0] = Output(5, True)
    (output,) = story(entry, {})["outputs"]
    assert [(stage["name"], stage["time"]) for stage in output["stages"]][:3] == [
        ("received", 1.0),
        ("validated", 2.0),
        ("tokenized", None),
    ]
    assert len(output["stages"]) == 8
    assert (output["state"], output["row"], output["reason"]) == ("waiting", None, None)


def test_each_stage_names_code_that_is_there() -> None:
    table = stages()
    assert len(table) == 11
    for stage in table:
        for code in stage["code"]:
            head = code["text"].lstrip()
            assert head.startswith((f"def {code['name'].split('.')[-1]}(", f"async def {code['name'].split('.')[-1]}("))
            assert len(code["text"].splitlines()) == code["last"] - code["first"] + 1
