"""What the host does between two steps that verify drafts, for which a GPU would wait: no GPU is needed.

    python benchmark/draft_host.py [--streams 1 8 32] [--output-len 400] [--accept 0.7] [--observed] [--profile]

The scheduler, and what a GPU's engine does on the host, with the captured steps of a small hybrid that has a head, but
replays compute nothing: the head tells drafts of three, and a seeded coin says which of their tokens are sampled. Times
are of the thread (CPU time): `gap` from when a step's results can be read to when the next one's graph is launched,
below zero where that was before; `rest` what else a turn of the loop takes, while the device computes: telling outputs,
and text. Parts of the gap: `result`, `retire`, `plan`, `launch` (as far as that). Prints medians in milliseconds of
steps of all streams, and in brackets what a tenth of them is below: other programs on the same core only add. What a
GPU's driver takes for three to five launches comes on top. --observed: with a server's observers, and without text.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from minisgl.attention.base import AttentionStep
from minisgl.benchmark import run_script
from minisgl.benchmark.offline import model_options
from minisgl.config.args import args_from_options
from minisgl.config.resolve import prepare
from minisgl.core import Masks, SamplingParams, StepPlan, StepResult
from minisgl.distributed.comm import Communicator
from minisgl.engine import cuda
from minisgl.engine.shapes import GraphShape
from minisgl.engine.shard import ModelShard
from minisgl.engine.staging import DeviceTables
from minisgl.engine.step import Launched
from minisgl.kernel.ops import TorchOps
from minisgl.message import messages as wire
from minisgl.scheduler.observer import Observer, Status
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport
from minisgl.tokenizer.detokenize import Detokenizer
from minisgl.tokenizer.tokenize import Tokenizer
from minisgl.trace.recorder import Recorder

DRAFT_LEN, PROMPT_LEN, TOKEN = 3, 128, 7
SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 4096, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "mtp_num_hidden_layers": 1, "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
Seconds = dict[str, list[float]]


class NoGraphs:
    """In place of `DecodeGraphs`: nothing is computed. accept: share of right drafts; replayed: when it last was."""

    accept, replayed = 0.7, 0.0

    def __init__(self, prepare: Callable[[GraphShape], object], shapes: Sequence[GraphShape]) -> None:
        self._runs = [prepare(shape) for shape in shapes]
        self._coin = np.random.default_rng(1)
        self._results = {shape: (torch.full((shape.num_tokens,), TOKEN, dtype=torch.int32),
                                 torch.full((shape.num_reqs, DRAFT_LEN), TOKEN, dtype=torch.int32) if shape.is_wide
                                 else None) for shape in shapes}  # fmt: skip

    def replay(self, shape: GraphShape) -> tuple[torch.Tensor, torch.Tensor | None]:
        NoGraphs.replayed = time.thread_time()
        ids, told = self._results[shape]
        ids.copy_(torch.from_numpy(TOKEN + (self._coin.random(len(ids)) > self.accept)))
        return ids.clone(), None if told is None else told.clone()  # as what a GPU copies behind each step


class NoBackend:
    plans_captured = False

    def prepare_both(self, step: AttentionStep, captured: bool) -> tuple[object, object]:
        assert captured, f"a step of {len(step.rows)} was not captured"
        return None, None


class NoDrafts:
    """In place of the module of `draft.cu`: steps that follow others find their places by themselves."""

    def plan(self, *_: object) -> None:
        """A kernel's launch, in graphs."""

    follow = plan


class Ops(TorchOps):
    most_ruled = 1 << 20
    draft = NoDrafts()

    def captures_chunks(self, _: object) -> bool:
        return True

    def scatter(self, *_: object) -> None:
        """A kernel's launch."""


class Steps(cuda.CapturedSteps):
    def _launch(self, plan: StepPlan, masks: Masks | None, before: Launched) -> Launched:
        """Prompts are not computed."""
        if any(share.num_new != share.num_samples for share in plan.reqs):
            num = sum(share.num_samples for share in plan.reqs)
            told = torch.full((len(plan.reqs), DRAFT_LEN), TOKEN, dtype=torch.int32)
            return Launched(torch.full((num,), TOKEN, dtype=torch.int32), drafts=told)
        return super()._launch(plan, masks, before)


class Engine:
    """A `core.Executor` whose steps have run when they are launched. seconds: of each `launch` and `result`."""

    def __init__(self, config: Any, seconds: Seconds) -> None:
        self._seconds = seconds
        shard = ModelShard(config, torch.device("cpu"), Communicator(), Ops())
        tables = DeviceTables(config, shard.ops, shard.ropes, shard.device)
        backend: Any = NoBackend()
        pages = [config.num_pages + 1] * 2
        self.steps = Steps(shard, tables, backend, pages, config.cuda_graph_max_bs)
        self.ready = 0.0

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Any:
        begin = time.thread_time()
        with torch.inference_mode():
            launched = self.steps.launch(plan, masks)
        self._seconds["launch"].append(NoGraphs.replayed - begin)

        def wait(_: float | None = None) -> bool:
            self.ready = time.thread_time()
            return True

        def result() -> StepResult:
            begin = time.thread_time()
            found = launched.result(plan)
            self._seconds["result"].append(time.thread_time() - begin)
            return found

        return SimpleNamespace(wait=wait, result=result)

    def close(self) -> None:
        pass


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        begin = time.thread_time()
        found = function(*args)
        if found is not None:  # else it is too early for a plan, as is known at once
            seconds.append(time.thread_time() - begin)
        return found

    return call


def measure(config: Any, args: argparse.Namespace, num: int) -> Seconds:
    seconds: Seconds = {name: [] for name in ("gap", "rest", "result", "retire", "plan", "launch")}
    engine = Engine(config.engine, seconds)
    transport, observers = LocalTransport(), list[Observer]([Status(), Recorder()] if args.observed else [])
    scheduler = Scheduler(config.scheduler, engine, transport, *observers)
    planner = scheduler.planner
    planner.retire = timed(planner.retire, seconds["retire"])  # type: ignore[method-assign]
    planner.plan = timed(planner.plan, seconds["plan"])  # type: ignore[method-assign]
    detokenizer, numbers = Detokenizer(Tokenizer(config.tokenizer).codec), np.random.default_rng(0)
    for uid in range(num):
        prompt = wire.pack_ids(numbers.integers(16, 4000, PROMPT_LEN).tolist())
        params = SamplingParams(args.output_len, 0.0, seed=1, ignore_eos=True)
        transport.put([wire.UserMsg(uid, prompt, params)])
    gc.collect()
    gc.freeze()
    profile = cProfile.Profile(time.thread_time) if args.profile else None
    while True:
        counts, begin = [len(times) for times in seconds.values()], time.thread_time()
        if profile and len(planner.running) == num:
            profile.enable()
        scheduler.turn()
        if profile:
            profile.disable()
        outputs = [] if args.observed else transport.take_outputs()
        for message in outputs:
            assert isinstance(message, wire.DetokenizeMsg)
            detokenizer.detokenize(message)
        end = time.thread_time()
        is_whole = len(planner.running) == num and planner.inflight and planner.inflight[-1].plan.drafts
        if not is_whole or engine.ready < begin:
            for count, times in zip(counts, seconds.values(), strict=True):
                del times[count:]
        else:
            seconds["gap"].append(NoGraphs.replayed - engine.ready)
            seconds["rest"].append(end - begin - (NoGraphs.replayed - engine.ready))
        if not planner.reqs:
            break
    gc.unfreeze()
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=[1, 8, 32], nargs="+")
    parser.add_argument("--output-len", type=int, default=400)
    parser.add_argument("--accept", type=float, default=0.7)
    parser.add_argument("--observed", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    empty, event = torch.empty, SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    NoGraphs.accept = args.accept
    options = {"device": "cpu", "dtype": "float32", "speculate": "mtp", "max_seq_len": 1024, "page_size": 16,
               "max_running_requests": 128, "num_pages": 8192, "config_override": SHAPE}  # fmt: skip
    with (
        patch.object(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how)),  # noqa: ARG005
        patch.object(torch.cuda, "Event", lambda: event),
        patch.object(cuda, "DecodeGraphs", NoGraphs),
        model_options("qwen3.5-9b", options) as options,
    ):
        config = prepare(args_from_options(options))
        graphs: dict[str, Any] = {"draft_len": DRAFT_LEN, "cuda_graph_max_bs": 256}
        config = replace(config, engine=replace(config.engine, **graphs),
                         scheduler=replace(config.scheduler, **graphs, step_costs=(0.004, 0.5)))  # fmt: skip
        for num in args.streams:
            found = {name: 1e3 * np.array(times) for name, times in measure(config, args, num).items()}
            times = (f"{name} {np.median(ms):.3f} ({np.quantile(ms, 0.1):.3f})" for name, ms in found.items())
            print(f"{num} streams, {len(found['gap'])} steps, ms: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    run_script(main)
