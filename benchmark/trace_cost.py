"""What the trace costs: blocks of the same work in one process, with and without it in turns.

    python benchmark/trace_cost.py [--shape qwen3-0.6b] [--streams 64] [--output-len 32] [--seconds 50] [flags]

Further flags go to the engine. A block is so many requests that come at once, run and end; its prompts are cached but
for their last page. Three kinds of blocks follow one another in an order that is drawn anew each round: without the
trace; with it (rank 0's recorder, and what the API server notes of each request); and with it while somebody looks four
times a second, whose answers are made here, too. Prints medians of the ratios within each round, with intervals of 95 %
(bootstrap), for wall time and for the processor time of the whole process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.offline import engine_options, model_options
from minisgl.config.args import parse_args
from minisgl.core import ReqOutput, StepPlan
from minisgl.llm.llm import Pending
from minisgl.message.messages import IdsPrompt, TokenizeMsg, TraceMsg, UserMsg, pack_ids
from minisgl.scheduler.observer import Observer
from minisgl.scheduler.planner import Planned
from minisgl.trace.journal import Journal, Story, take
from minisgl.trace.recorder import Recorder
from minisgl.trace.records import decode_recorded, encode_json

KINDS = ("off", "on", "viewed")
INTERVAL = 0.25  # seconds between a viewer's questions


class Switched(Observer):
    """A recorder that is told of what happens only while it is on. It changes between blocks, when nothing is left."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.is_on = recorder, True
        self.attached = recorder.attached  # type: ignore[method-assign]

    def received(self, message: UserMsg) -> None:
        if self.is_on:
            self.recorder.received(message)

    def resumed(self) -> None:
        if self.is_on:
            self.recorder.resumed()

    def submitted(self, planned: Planned) -> None:
        if self.is_on:
            self.recorder.submitted(planned)

    def retired(self, plan: StepPlan, seconds: float) -> None:
        if self.is_on:
            self.recorder.retired(plan, seconds)

    def told(self, outputs: Sequence[ReqOutput]) -> None:
        if self.is_on:
            self.recorder.told(outputs)

    def turned(self) -> None:
        if self.is_on:
            self.recorder.turned()


class Blocks:
    """The same requests again and again."""

    def __init__(self, llm: LLM, streams: int, input_len: int, output_len: int) -> None:
        self._llm, self._switch, self._journal = llm, Switched(Recorder()), Journal()
        llm.scheduler = llm.rank.scheduler(llm.transport, self._switch)
        draw = Random(0)
        self._prompts = [[draw.randrange(3, 400) for _ in range(input_len)] for _ in range(streams)]
        self._params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        self._looked, self._since = 0.0, 0

    def run(self, kind: str) -> tuple[float, float]:
        """Seconds of one block: of the clock, and of all threads on processors."""
        self._switch.is_on = kind != "off"
        wall, cpu = time.perf_counter(), time.process_time()
        pending = self._llm.submit([IdsPrompt(pack_ids(prompt)) for prompt in self._prompts], self._params)
        records = [self._begin(request) for request in pending] if self._switch.is_on else []
        while self._llm.pending:
            self._llm.turn()
            if kind == "viewed" and time.perf_counter() > self._looked + INTERVAL:
                self._look()
        for request, (story, output) in zip(pending, records, strict=False):
            take(output, request.replies[0])
            take(output, request.replies[-1])
            self._journal.close(story, {})
        return time.perf_counter() - wall, time.process_time() - cpu

    def _begin(self, request: Pending) -> tuple[Story, Any]:
        message = TokenizeMsg(request.uid, IdsPrompt(b""), self._params)
        story = Story(time.time(), {})
        return story, self._journal.begin(story, 0, request.uid, message)

    def _look(self) -> None:
        self._looked = time.perf_counter()
        question = TraceMsg(0, (), self._since, 64, view=2)
        recorded = decode_recorded(self._switch.recorder.reply(question).data)
        encode_json({"steps": recorded.steps, **(recorded.now or {})})
        self._since = recorded.steps[-1].step if recorded.steps else self._since


def interval(values: Sequence[float], draw: Random) -> str:
    """The median, and where 95 % of medians of samples of these lie."""
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return f"{statistics.median(values):.4f} ({medians[50]:.4f} to {medians[1949]:.4f})"


def measure(blocks: Blocks, seconds: float, num_tokens: int) -> None:
    draw, end = Random(1), time.perf_counter() + seconds
    for kind in KINDS:
        blocks.run(kind)
    rounds: list[dict[str, tuple[float, float]]] = []
    while time.perf_counter() < end:
        order = draw.sample(KINDS, len(KINDS))
        rounds.append({kind: blocks.run(kind) for kind in order})
    off = statistics.median(one["off"][0] for one in rounds)
    print(f"{len(rounds)} rounds; a block without the trace: {1e3 * off:.1f} ms, {num_tokens / off:.0f} tokens/s\n")
    print("| time of a block, to that without the trace | of the clock | of processors |\n|---|---|---|")
    for kind in KINDS[1:]:
        ratios = [[one[kind][index] / one["off"][index] for one in rounds] for index in (0, 1)]
        print(f"| {kind} | {interval(ratios[0], draw)} | {interval(ratios[1], draw)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="random weights of a shape, or a directory with config.json")
    for name, default in {"streams": 64, "input-len": 64, "output-len": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=45)
    args, rest = parser.parse_known_args()
    with model_options(args.shape, engine_options(parse_args(rest))) as model, LLM(**model) as llm:
        blocks = Blocks(llm, args.streams, args.input_len, args.output_len)
        measure(blocks, args.seconds, args.streams * args.output_len)


if __name__ == "__main__":
    run_script(main)
