"""What rank 0 remembers of requests and steps, on a device that computes nothing; what is made of it; and what the API
server adds, and asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from minisgl.config.args import args_from_options
from minisgl.config.resolve import prepare
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Grammar, SamplingParams
from minisgl.message.messages import AbortMsg, TextPrompt, TokenizeMsg, TraceMsg, TraceReply, UserMsg, pack_ids
from minisgl.page.stages import stages
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport
from minisgl.server.errors import add_error_handlers
from minisgl.server.metrics import RequestMetrics
from minisgl.trace import recorder as module
from minisgl.trace import routes
from minisgl.trace.export import chart, spans
from minisgl.trace.journal import Journal, Story, arrived
from minisgl.trace.recorder import Recorder
from minisgl.trace.records import STAGES, Event, Output, Recorded, decode_recorded
from minisgl.trace.routes import Trace
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

    def of(self, uid: int) -> Output:
        return self.ask(uid).outputs[0]

    def look(self, view: int = 1) -> dict[str, Any]:
        seen = self.ask(view=view).now
        assert seen is not None
        return seen


def named(output: Output, *names: str) -> list[Event]:
    return [event for event in output.events if event.name in names]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_prompt_is_seen_chunk_by_chunk_and_its_end(overlap: bool) -> None:
    world = World(overlap=overlap)
    world.put(7, 40)
    world.run()
    output = world.of(7)
    assert [(chunk.start, chunk.num_new) for chunk in named(output, "prefill")] == [(0, 16), (16, 16), (32, 8)]
    assert (output.num_chunks, output.num_prompt, output.num_output, output.reason) == (3, 40, 5, "length")
    times = [event.time for event in named(output, *STAGES)]
    assert [event.name for event in output.events][:4] == ["tokenized", "queued", "admitted", "prefill"]
    assert len(times) == 4 and times == sorted(times)  # type: ignore[type-var]
    steps = world.ask(num_steps=100).steps
    assert [step.num_tokens for step in steps] == [16, 16, 8, 1, 1, 1, 1]
    assert [row for step in steps for row in step.rows][2:4] == [(0, 7, 8, 1), (0, 7, 1, 0)]
    assert all((step.host_ms or 0) > 0 and (step.device_ms or 0) > 0 for step in steps)
    assert all(step.pages and sum(step.pages.values()) == CONFIG.num_pages for step in steps)


def test_the_rows_of_each_step_are_its_own() -> None:
    """Those of the step before may be used again, but not when a request has come, gone, or is in its prefill."""
    world = World(max_running_requests=3)
    for uid, size, num_tokens in ((1, 20, 9), (2, 4, 3), (3, 4, 6), (4, 8, 4)):
        world.put(uid, size, num_tokens)
    planned, plan = [], world.scheduler.planner.plan
    world.scheduler.planner.plan = lambda: planned.append(plan()) or planned[-1]  # type: ignore[method-assign, func-returns-value]
    world.run(60)
    made = [one for one in planned if one is not None]
    for step, (shares, reqs) in zip(world.ask(num_steps=100).steps, made, strict=True):
        told = [(share.row, req.uid, share.num_new) for share, req in zip(shares.reqs, reqs, strict=True)]
        assert [row[:3] for row in step.rows] == told
        assert sum(not row[3] for row in step.rows) == step.num_decode == shares.num_decode


def test_runs_of_guesses_are_seen() -> None:
    """The second time, the first output is guessed from the prefix cache."""
    world = World(speculate="ngram", max_seq_len=128)
    for uid in (3, 43):  # of the same prompt
        world.put(uid, 40, 60)
        world.run()
    first, second = world.of(3), world.of(43)
    runs = named(second, "accepted")
    assert len(runs) > 5 and sum(run.num_new or 0 for run in runs) == second.num_accepted > 40
    assert second.num_accepted <= second.num_drafted < 60 and second.num_output == 60
    assert all(40 < (run.start or 0) < 100 and 0 < (run.num_new or 0) <= 8 for run in runs)
    assert first.num_accepted < 10
    rows = [row for step in world.ask(num_steps=1000).steps for row in step.rows if row[1] == 43]
    assert [row[3] for row in rows].count(2) >= len(runs)
    assert all((kind == 0) <= (num_new == 1) and (kind != 2 or num_new > 1) for _, _, num_new, kind in rows)
    kinds = [slice["name"] for slice in chart([], world.ask(num_steps=1000).steps)["traceEvents"] if slice["ph"] == "X"]
    assert any(kind.startswith("verify ") for kind in kinds) and "decode" in kinds and "prefill 16" in kinds


def test_what_the_prefix_cache_gave_is_told() -> None:
    world = World()
    world.put(1, 40)
    world.run()
    world.transport.put([UserMsg(2, pack_ids([37 + i for i in range(3)]), SamplingParams(max_tokens=2, seed=0))])
    prompt = pack_ids([(37 + i) % 40 for i in range(40)])
    world.transport.put([UserMsg(3, prompt, SamplingParams(max_tokens=2, seed=0, ignore_eos=True))])
    world.run()
    assert world.of(2).num_cached == 0
    assert world.of(3).num_cached == 36  # whole pages, and one token is left to compute
    (admitted,) = named(world.of(3), "admitted")
    assert admitted.start == 36
    seen = world.look(2)
    assert sum(node["num_pages"] for node in seen["tree"]["nodes"]) == seen["pages"]["cached"] > 0


def test_a_retraction_is_seen_and_what_comes_after_it() -> None:
    world = World(num_pages=32, max_seq_len=128)
    for uid in range(1, 5):
        world.put(uid, 8, 60)
    world.run(600)
    outputs = world.ask(1, 2, 3, 4).outputs
    assert sum(output.num_retractions for output in outputs) == world.scheduler.planner.num_retracted > 0
    for output in outputs:
        events = named(output, "admitted", "retracted")
        assert [event.name for event in events] == ["admitted", *["retracted", "admitted"] * output.num_retractions]
        assert all(8 <= (event.start or 0) < 68 for event in named(output, "retracted"))


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
    (waiting,) = world.look()["waiting"]
    assert (waiting["uid"], waiting["why"], waiting["retracted"]) == (2, why, False)
    assert waiting["since"] == world.of(2).events[1].time
    world.run()
    assert [event.why for uid in (1, 2) for event in named(world.of(uid), "queued")] == [None, why]
    assert named(world.of(2), "queued")[0].ahead == 1


def test_who_waits_while_no_step_can_be_planned_waits_for_pages() -> None:
    world = World()
    world.scheduler.planner.add(5, [1, 2, 3], SamplingParams(max_tokens=4, seed=0))
    (waiting,) = world.look()["waiting"]
    assert (waiting["uid"], waiting["why"]) == (5, "pages")


def test_whom_the_policy_lets_wait_is_told() -> None:
    world = World(max_running_requests=1, schedule_policy="priority")
    world.put(1, 8, 20)
    world.run(3)
    world.put(2, 8, 5, priority=5)
    world.run(2)
    for uid in (3, 4):
        world.put(uid, 8, 5, priority=1)
    world.run(24)
    assert {waiting["uid"]: waiting["why"] for waiting in world.look()["waiting"]}[2] == "policy"
    world.run()
    queued = [named(world.of(uid), "queued")[0] for uid in (1, 2, 3, 4)]
    assert [event.overtaken for event in queued] == [0, 2, 0, 0]
    assert [event.why for event in queued] == [None, "policy", "rows", "rows"]


def test_who_waited_for_a_grammar_is_told_so() -> None:
    world = World()
    late = UserMsg(
        1,
        pack_ids([1, 2]),
        SamplingParams(max_tokens=2, seed=0, grammar=Grammar("regex", "a")),
        tokenized=world.now - 1,
    )
    world.recorder.received(late)
    assert [event.why for event in named(world.of(1), "queued")] == ["grammar"]


def test_all_that_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 10)
    monkeypatch.setattr(module, "MAX_EVENTS", 8)
    world = World(max_prefill_length=4)
    for uid in range(30):
        world.put(uid, 40, 60)
        world.run(90)
    world.transport.put([UserMsg(99, pack_ids([]), SamplingParams(max_tokens=1, seed=0))])
    world.put(100, 8)
    world.transport.put([AbortMsg(100), AbortMsg(3)])
    world.run(5)
    known = world.ask(*range(101)).outputs
    assert [output.uid for output in known] == [*range(22, 30), 99, 100]
    assert [output.reason for output in known][-3:] == ["length", "error", "abort"]
    for output in known[:-2]:
        assert (len(output.events) <= 9, output.num_chunks) == (True, 10)
        assert [event.name for event in named(output, *STAGES)] == ["tokenized", "queued", "admitted", "finished"]
        assert named(output, "prefill") and named(output, "decode")
    assert len(world.ask(num_steps=5000).steps) <= module.MAX_STEPS
    last = world.ask(num_steps=1).steps[0].step
    assert [step.step for step in world.ask(since=last - 1, num_steps=5000).steps] == [last - 1, last]
    assert not world.ask().steps
    assert not (world.recorder._open or world.recorder._waiting or world.recorder._running)


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
    seen = world.look(2)
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


def _here(uid: int, received: float, ended: float) -> Output:
    """What the API server notes of an output."""
    detokenized = Event("detokenized", ended + 0.01, first=ended - 0.01)
    begun = [Event("received", received), Event("validated", received + 0.1)]
    return Output(uid, events=[*begun, detokenized, Event("sent", ended + 0.1)], reason="stop", num_output=5)


def _told(world: World, *uids: int) -> list[dict[str, Any]]:
    known = {output.uid: output for output in world.ask(*uids).outputs}
    told = []
    for uid, output in known.items():
        story = Story(0.0, {}, ids=(f"r{uid}", "c", ""))
        ended = output.events[-1].time
        assert ended is not None
        story.outputs[0] = _here(uid, (output.events[0].time or 0) - 0.5, ended)
        told.append(story.told(known, ""))
    return told


def test_the_chart_keeps_the_rules_of_the_trace_event_format() -> None:
    """Those of "Trace Event Format" (Google, 2016) that we use: complete events nest on their track, asynchronous ones
    begin and end once for each name and id, metadata names processes and threads, and what has the same `bind_id` is a
    flow: it leaves the first slice, comes to the last, and does both in between."""
    world = World()
    for uid in range(1, 9):
        world.put(uid, 5 * uid, 12)
    world.run()
    told, steps = _told(world, *range(1, 9)), world.ask(num_steps=500).steps
    events = chart(told, steps)["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "b", "e"}
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["ts"], int)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["dur"] > 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for ends in tracks.values():
        ends.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
    begun, ended = ([(one["name"], one["id"]) for one in events if one["ph"] == kind] for kind in "be")
    assert len(begun) == len({*begun}) and {*begun} == {*ended}
    assert len(begun) == len(told) * (len(STAGES) - 1)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {*names.values()} == {"api", "tokenizer", "scheduler", "engine", "detokenizer", "rows"}
    rows = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert rows == {row[0] for step in steps for row in step.rows}
    flows: dict[int, list[Any]] = {}
    for event in [event for event in events if "bind_id" in event and event["ph"] != "e"]:
        flows.setdefault(event["bind_id"], []).append(
            (event.get("flow_in"), event.get("flow_out"), event["args"]["uid"])
        )
    assert {*flows} == {*range(1, 9)}
    for uid, flow in flows.items():
        assert flow == [(None, True, uid), *[(True, True, uid)] * (len(flow) - 2), (True, None, uid)]
    decodes = [event for event in events if event["cat" if "cat" in event else "ph"] == "rows"]
    assert len(decodes) == sum(len(step.rows) for step in steps)


def test_what_both_processes_know_is_one_story() -> None:
    world = World()
    world.put(1, 40, 5)
    world.run()
    (output,) = _told(world, 1)[0]["outputs"]
    assert [event.name for event in named(output, *STAGES)] == list(STAGES)
    assert [event.seconds for event in output.events] == sorted(event.seconds for event in output.events)
    assert output.events[0].seconds == 0
    (finished,) = named(output, "finished")
    assert output.reason == finished.reason == "stop"  # the client's, where rank 0 counts tokens
    assert [name for name, _, _ in spans(output)] == list(STAGES[1:])
    assert all(begin <= end for _, begin, end in spans(output))


def test_a_story_of_what_has_hardly_begun() -> None:
    journal = Journal()
    output = journal.begin(arrived(("a", "b", "c")), 0, 5, TokenizeMsg(5, TextPrompt("x"), SamplingParams()))
    (story,) = journal.stories
    (told,) = story.told({}, "c")["outputs"]
    assert [event.name for event in told.events] == ["received", "validated"]
    assert (told.uid, told.reason) == (5, None) and story.outputs[0] is output


def test_each_stage_names_code_that_is_there() -> None:
    table = stages()
    assert [stage["name"] for stage in table] == [*STAGES, "prefill", "decode", "accepted", "retracted", "refused"]
    for stage in table:
        for code in stage["code"]:
            head = code["text"].lstrip()
            assert head.startswith((f"def {code['name'].split('.')[-1]}(", f"async def {code['name'].split('.')[-1]}("))
            assert len(code["text"].splitlines()) == code["last"] - code["first"] + 1


class Asked:
    """The API server's side alone: what it asks of rank 0 is counted, and answered when it may be."""

    def __init__(self, **options: Any) -> None:
        self.num_asked, self.may_answer, self.journal = 0, asyncio.Event(), Journal()
        self.may_answer.set()
        self.app = FastAPI()
        add_error_handlers(self.app)
        Trace(self._ask, self.journal, RequestMetrics(), prepare(args_from_options(options))).add_to(self.app, ["/v1"])

        @self.app.post("/v1")
        async def complete() -> dict[str, int]:
            message = TokenizeMsg(1, TextPrompt("secret words"), SamplingParams())
            self.journal.begin(arrived(("one", "two", "")), 0, 1, message)
            return {}

    async def _ask(self, timeout: float, **wanted: Any) -> TraceReply:
        self.num_asked += 1
        await self.may_answer.wait()
        return World().recorder.reply(TraceMsg(1, **wanted))

    def client(self) -> httpx.AsyncClient:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {}).update(request_id="one", owner="", operator=True)
            await self.app(scope, receive, send)

        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def test_nothing_is_asked_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "EXPORT_SECONDS", 1.0)  # in which all three are answered

    async def run(**options: Any) -> list[int]:
        asked, seen = Asked(**options), []
        async with asked.client() as client:
            for path in ("/v1", "/v1/none", "/trace/stages"):
                await client.request("POST" if path == "/v1" else "GET", path)
            await asyncio.sleep(2 * routes.EXPORT_SECONDS)
            seen.append(asked.num_asked)
            for path in ("/trace/one", "/trace", "/trace/live"):
                assert (await client.get(path)).status_code == 200
                seen.append(asked.num_asked)
        return seen

    assert asyncio.run(run()) == [0, 1, 2, 3]
    assert asyncio.run(run(log_requests=True)) == [1, 2, 3, 4]  # the log looks


def test_so_many_may_look_at_once() -> None:
    async def run() -> list[int]:
        asked = Asked()
        asked.may_answer.clear()
        async with asked.client() as client:
            waiting = [asyncio.create_task(client.get("/trace/live")) for _ in range(routes.MAX_VIEWERS)]
            for _ in range(500):  # turns of the loop, however long each takes
                await asyncio.sleep(0)
            refused = await client.get("/trace/live")
            assert refused.json()["error"]["code"] == "too_many_viewers"
            asked.may_answer.set()
            return [refused.status_code, *[(await answer).status_code for answer in waiting]]

    assert asyncio.run(run()) == [429, *[200] * 8]


@pytest.mark.parametrize(("options", "status"), [({}, 403), ({"slow_motion": True}, 200), ({"api_key": ("k",)}, 200)])
def test_slow_motion_is_off_unless_somebody_may_have_it(options: dict[str, Any], status: int) -> None:
    async def run() -> httpx.Response:
        async with Asked(**options).client() as client:
            assert (await client.get("/trace/live")).json()["may_slow"] is (status == 200)
            return await client.post("/trace/pace", json={"delay_ms": 100})

    answer = asyncio.run(run())
    assert answer.status_code == status
    assert (answer.json().get("error") or {"code": None})["code"] == (None if status == 200 else "slow_motion_off")


@pytest.mark.parametrize("keep", [False, True])
def test_prompts_are_told_where_the_operator_wants_it(keep: bool) -> None:
    async def run() -> Any:
        async with Asked(trace_prompts=keep).client() as client:
            await client.post("/v1")
            return (await client.get("/trace/one")).json()["prompt"]

    prompt = asyncio.run(run())
    assert ("secret words" in prompt) if keep else (prompt is None)
