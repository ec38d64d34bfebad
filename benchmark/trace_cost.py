"""What the trace costs: decode steps of one process, with and without it in turns.

    python benchmark/trace_cost.py [--shape qwen3-0.6b] [--streams 64] [--turns 4] [--viewed] [--seconds 45] [flags]

Further flags go to the engine. Two kinds of groups of so many steps follow one another, in an order that is drawn anew
each round: without rank 0's recorder, and with it; with --viewed also while somebody looks, once in each group, whose
answer is made here, too. Prints medians of the ratios within each round, with intervals of 95 % (bootstrap), for the
clock and for the processor time of the whole process. What a request costs once, at rank 0 and at the API server, is
timed by itself.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from random import Random

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.offline import engine_options, model_options
from minisgl.config.args import parse_args
from minisgl.core import ReqOutput, StepPlan
from minisgl.llm import Pending
from minisgl.message.messages import IdsPrompt, TokenizeMsg, TraceMsg, UserMsg, pack_ids
from minisgl.scheduler.observer import Observer
from minisgl.scheduler.plan import Planned
from minisgl.trace.journal import Journal, Story, take
from minisgl.trace.recorder import Recorder
from minisgl.trace.records import decode_recorded, encode_json


class Switched(Observer):
    """A recorder that is told of steps only while it is on, and of requests always: that is timed."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.is_on, self.seconds = recorder, True, 0.0
        self.attached = recorder.attached  # type: ignore[method-assign]
        self.resumed = recorder.resumed  # type: ignore[method-assign]

    def received(self, message: UserMsg) -> None:
        begin = time.perf_counter()
        self.recorder.received(message)
        self.seconds += time.perf_counter() - begin

    def submitted(self, planned: Planned) -> None:
        if self.is_on or planned.plan.admissions:
            self.recorder.submitted(planned)

    def retired(self, plan: StepPlan, seconds: float) -> None:
        if self.is_on:
            self.recorder.retired(plan, seconds)

    def told(self, outputs: Sequence[ReqOutput]) -> None:
        if self.is_on or any(output.finish_reason is not None for output in outputs):
            begin = time.perf_counter()
            self.recorder.told(outputs)
            self.seconds += time.perf_counter() - begin

    def turned(self) -> None:
        if self.is_on:
            self.recorder.turned()


class Streams:
    """So many requests that come at once, again and again, and how long groups of their decode steps take."""

    def __init__(self, llm: LLM, streams: int, turns: int, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self._llm, self._turns, self._journal, self._draw = llm, turns, Journal(), Random(0)
        self.switch = Switched(Recorder())
        llm.scheduler = llm.rank.scheduler(llm.transport, self.switch)
        self._prompts = [[self._draw.randrange(3, 400) for _ in range(64)] for _ in range(streams)]
        self._params = SamplingParams(
            max_tokens=4 + turns * len(kinds) * max(1, 192 // (turns * len(kinds))), temperature=0.0, ignore_eos=True
        )
        self.rounds: list[dict[str, tuple[float, float]]] = []
        self.num_requests, self.journal_seconds, self.since = 0, 0.0, 0

    def run(self) -> None:
        """The requests once. Groups in which one comes or ends are left out."""
        llm, streams = self._llm, len(self._prompts)
        pending = llm.submit([IdsPrompt(pack_ids(prompt)) for prompt in self._prompts], self._params)
        while len(llm.scheduler.planner.running) < streams or llm.scheduler.planner.waiting:
            llm.turn()
        for _ in range(3):
            llm.turn()
        while len(llm.pending) == streams:
            order = self._draw.sample(self.kinds, len(self.kinds))
            measured = {kind: self._group(kind) for kind in order}
            if len(llm.pending) == streams:
                self.rounds.append(measured)
        self.switch.is_on = True
        while llm.pending:
            llm.turn()
        self.num_requests += streams
        begin = time.perf_counter()
        for request in pending:
            self._note(request)
        self.journal_seconds += time.perf_counter() - begin

    def _group(self, kind: str) -> tuple[float, float]:
        """Seconds of a step: of the clock, and of all threads on processors."""
        self.switch.is_on = kind != "off"
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self._turns):
            self._llm.turn()
        if kind == "viewed":
            question = TraceMsg(0, (), self.since, 64, view=2)
            recorded = decode_recorded(self.switch.recorder.reply(question).data)
            encode_json({"steps": recorded.steps, **(recorded.now or {})})
            self.since = recorded.steps[-1].step if recorded.steps else self.since
        return (time.perf_counter() - wall) / self._turns, (time.process_time() - cpu) / self._turns

    def _note(self, request: Pending) -> None:
        """What the API server does for a request."""
        story, message = Story(time.time(), {}), TokenizeMsg(request.uid, IdsPrompt(b""), self._params)
        output = self._journal.begin(story, 0, request.uid, message)
        take(output, request.replies[0])
        take(output, request.replies[-1])
        self._journal.close(story, {})


def interval(values: Sequence[float], draw: Random) -> str:
    """The median, and where 95 % of medians of samples of these lie."""
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return f"{statistics.median(values):.4f} ({medians[50]:.4f} to {medians[1949]:.4f})"


def measure(work: Streams, seconds: float) -> None:
    draw, end = Random(1), time.perf_counter() + seconds
    work.run()
    work.rounds.clear()
    while time.perf_counter() < end:
        work.run()
    rounds, off = work.rounds, statistics.median(one["off"][0] for one in work.rounds)
    print(f"{len(rounds)} rounds; a step without the recorder: {1e3 * off:.2f} ms\n")
    print("| time of a step, to that without it | of the clock | of processors |\n|---|---|---|")
    for kind in work.kinds[1:]:
        ratios = [[one[kind][index] / one["off"][index] for one in rounds] for index in (0, 1)]
        print(f"| {kind} | {interval(ratios[0], draw)} | {interval(ratios[1], draw)} |", flush=True)
    own, journal = (1e6 * spent / work.num_requests for spent in (work.switch.seconds, work.journal_seconds))
    print(f"\na request, once: {own:.0f} µs at rank 0, {journal:.0f} µs at the API server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="random weights of a shape, or a directory with config.json")
    for name, default in {"streams": 64, "turns": 4, "seconds": 45}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--viewed", action="store_true", help="somebody looks, once in each group of a third kind")
    args, rest = parser.parse_known_args()
    kinds = ("off", "on", "viewed") if args.viewed else ("off", "on")
    with model_options(args.shape, engine_options(parse_args(rest))) as model, LLM(**model) as llm:
        work = Streams(llm, args.streams, args.turns, kinds)
        gc.freeze()  # as the processes of a server do
        measure(work, args.seconds)


if __name__ == "__main__":
    run_script(main)
