"""What the host does for a step of a GPU: the processor time of scheduling, masks, detokenizing and answering.

    python benchmark/offline/host.py [--streams 64] [--tokens 128] [--rounds 5] [--device-ms 0] [--server]

The kinds of `features.py` in an `LLM` whose device computes nothing: it answers with random tokens that the masks allow
and with random log-probabilities, `--device-ms` after the step before. What a GPU's engine does on the host with numpy
(its tables, masks and results) is in it; what it launches is not. Prints, for each kind, milliseconds of a step: of the
main thread's processor time, of all threads', and by the clock; steps for each token; and the shares that were computed
in vain. What the stand-in for the device takes itself is not counted. --server: outputs take a server's way, and what
the scheduler takes stands beside what the detokenizer's process would. --profile: `cProfile` of one kind.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import FEATURES, make_params  # type: ignore[import-not-found]

from minisgl import LLM
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import describe_machine
from minisgl.benchmark.shapes import write_shape
from minisgl.config.runtime import EngineConfig
from minisgl.core import NOT_READY, Masks, StepPlan, StepResult
from minisgl.engine import engine as engines
from minisgl.engine.logprobs import DeviceLogprobs, LogprobStep
from minisgl.engine.rules import NO_MASK, StepRules
from minisgl.engine.step import Launched
from minisgl.engine.tables import RowTables, StepIndex
from minisgl.grammar.source import VocabularyConfig
from minisgl.grammar.store import GrammarStore
from minisgl.message import messages as wire
from minisgl.scheduler.grammar import Grammars, Reply
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport
from minisgl.tokenizer.detokenize import Detokenizer

_POLL_SECONDS = 2e-5


class Clocks:
    """Seconds of this thread, of all threads and by the clock, and those of them that do not count."""

    def __init__(self) -> None:
        self.left_out = np.zeros(3)

    @staticmethod
    def now() -> np.ndarray:
        return np.array([time.thread_time(), time.process_time(), time.perf_counter()])

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = self.now()
        yield
        self.left_out += self.now() - begin


class Handle:
    """A step that has ended at `due`, by the clock: no sooner than its masks were there."""

    def __init__(self, device: Device, plan: StepPlan, masks: Masks | None) -> None:
        device.host.apply(plan)
        due = max(time.perf_counter(), device.free) + device.seconds
        self._plan, self._launched = plan, device.finish(plan, StepIndex.of(plan.reqs), masks)
        self._due = device.free = max(due, time.perf_counter())

    def wait(self, timeout: float | None = None) -> bool:
        deadline = np.inf if timeout is None else time.perf_counter() + timeout
        while (now := time.perf_counter()) < self._due:
            if now > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def result(self) -> StepResult:
        self.wait()
        return self._launched.result(self._plan)


class Device:
    """An executor as `CudaRunner`, of a device that takes `seconds` for a step and draws its results."""

    num_window_pages = 0

    def __init__(self, config: EngineConfig, clocks: Clocks, seconds: float = 0.0) -> None:
        self.clocks, self.seconds, self.num_pages = clocks, seconds, config.max_running_requests * 32
        self.num_steps = self.num_shares = self.num_missed = 0
        self.host = RowTables(config.max_running_requests + 1, config.max_seq_len, config.page_size)
        self.free = 0.0
        self._vocab_size, self._random = config.model.vocab_size, np.random.default_rng(0)

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Handle:
        return Handle(self, plan, masks)

    def finish(self, plan: StepPlan, index: StepIndex, masks: Masks | None) -> Launched:
        rules = None
        if plan.masked:
            rules = self.host.logit_rules.step(index.sample_rows, index.sample_positions, plan.masked, masks)
        wanted = self.host.logprob_rules.sampled(index.sample_rows)
        with self.clocks.paused():
            launched = Launched(self._sampled(len(index.sample_rows), rules), self._logprobs(wanted))
            self.num_steps += 1
            self.num_shares += len(plan.reqs)
            self.num_missed += int((launched.ids == NOT_READY).sum())
        return launched

    def _sampled(self, num: int, rules: StepRules | None) -> torch.Tensor:
        ids = self._random.integers(0, self._vocab_size, num, np.int32)
        if rules is not None and rules.mask_of is not None:
            for i, mask in enumerate(rules.mask_of.tolist()):
                if mask == NOT_READY:
                    ids[i] = NOT_READY
                elif mask != NO_MASK and rules.masks is not None:
                    ids[i] = self._allowed(rules.masks[mask].numpy(), int(ids[i]))
        return torch.from_numpy(ids)

    def _allowed(self, words: np.ndarray, token: int) -> int:
        """A token that a mask allows: in the first word from this one's on that allows any, any of its bits."""
        found = np.flatnonzero(words)
        word = int(found[np.searchsorted(found, token // 32) % len(found)])
        bits = [bit for bit in range(32) if int(words[word]) >> bit & 1]
        return word * 32 + bits[token % len(bits)]

    def _logprobs(self, wanted: LogprobStep | None) -> DeviceLogprobs | None:
        if wanted is None:
            return None
        num, num_top = len(wanted.index), max(one.num_top for one in wanted.wanted)
        words = self._random.integers(0, self._vocab_size, (num, 1 + 2 * num_top), np.int32)
        words[:, 0::2] = -np.sort(self._random.random((num, 1 + num_top), np.float32) * 9).view(np.int32)
        return DeviceLogprobs(wanted, torch.from_numpy(words))

    def close(self) -> None:
        pass


class ServerTransport(LocalTransport):
    """Outputs go through messages' bytes to a detokenizer, and from it to bytes, as they do between processes."""

    def __init__(self, detokenizer: Detokenizer, clocks: Clocks, grammars: Grammars) -> None:
        super().__init__(grammars=grammars)
        self._detokenizer, self._clocks, self.seconds = detokenizer, clocks, 0.0

    def send(self, messages: list[Reply]) -> None:  # type: ignore[override]
        data = wire.tokenizer_codec.encode(messages)
        with self._clocks.paused():
            begin = time.thread_time()
            found = [self._detokenizer.detokenize(one) for one in wire.tokenizer_codec.decode(data)]  # type: ignore
            wire.frontend_codec.encode([reply for reply, _ in found if reply is not None])
            self.seconds += time.thread_time() - begin
            super().send([_bare(one) for one in messages])


def _bare(message: Reply) -> Reply:
    """What is left for an `LLM`, which counts tokens."""
    assert isinstance(message, wire.DetokenizeMsg)
    return wire.DetokenizeMsg(message.uid, message.token_ids, finish_reason=message.finish_reason, start=message.start)


def open_llm(path: Path, args: argparse.Namespace, clocks: Clocks) -> tuple[LLM, Device, ServerTransport | None]:
    create: Any = lambda config, rank: Device(config, clocks, args.device_ms / 1e3)  # noqa: E731, ARG005
    before, engines.create_engine = engines.create_engine, create
    try:
        llm = LLM(str(path), device="cpu", dtype="float32", max_seq_len=2048, max_running_requests=args.streams)
    finally:
        engines.create_engine = before
    llm.rank.grammars.close()
    model, config = llm.config.engine.model, llm.rank.config
    store = GrammarStore(VocabularyConfig(str(path), model.vocab_size, config.eos_token_ids))
    grammars = Grammars(store, is_gpu=True)
    server = ServerTransport(Detokenizer(llm.tokenizer.codec), clocks, grammars) if args.server else None
    llm.transport = server or LocalTransport(grammars=grammars)
    device: Any = llm.rank.engine
    llm.scheduler = Scheduler(config, device, llm.transport)
    return llm, device, server


class Bench:
    """Runs of one kind after the other."""

    def __init__(self, llm: LLM, device: Device, server: ServerTransport | None, args: argparse.Namespace) -> None:
        self._llm, self._device, self._server, self._args = llm, device, server, args
        self._numbers = random.Random(0)

    def run(self, feature: dict[str, object], every: int, around: Callable[[Callable[[], Any]], Any]) -> list[float]:
        """Milliseconds of a step: this thread, all, by the clock, the detokenizer; steps a token; share in vain."""
        args, device = self._args, self._device
        prompts = [[self._numbers.randrange(10, 4000) for _ in range(32)] for _ in range(args.streams)]
        params = [make_params(i, args.tokens, **({} if i % every else feature)) for i in range(args.streams)]
        device.num_steps = device.num_shares = device.num_missed = 0
        device.clocks.left_out[:] = 0
        if self._server is not None:
            self._server.seconds = 0.0
        begin = device.clocks.now()
        around(lambda: self._llm.generate(prompts, params, progress=lambda *_: None))
        seconds = device.clocks.now() - begin
        seconds[:2] -= device.clocks.left_out[:2]
        seconds[2] -= device.clocks.left_out[2] * (not device.seconds)
        per_step = [1e3 * second / args.tokens for second in (*seconds, self._server.seconds if self._server else 0.0)]
        return [*per_step, device.num_steps / args.tokens, device.num_missed / device.num_shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device-ms", type=float, default=0.0)
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(FEATURES), choices=[*FEATURES, "plain"])
    parser.add_argument("--profile", metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    kinds: dict[str, tuple[dict[str, object], int]] = {"plain": ({}, 1)}
    for name in args.only:
        kinds |= {name: (FEATURES.get(name, {}), 1), f"{name}, every second": (FEATURES.get(name, {}), 2)}
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        llm, device, server = open_llm(write_shape("qwen3-0.6b", folder), args, Clocks())
        with llm:
            bench = Bench(llm, device, server, args)
            for number in range(args.rounds + 1):
                for kind, (feature, every) in kinds.items():
                    result = bench.run(feature, every, lambda run: run())
                    found[kind] += [result] * (number > 0)
            if args.profile:
                profile = cProfile.Profile()
                bench.run(*kinds[args.profile], profile.runcall)
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            llm.transport.grammars.close()
    print(
        "| streams | thread, ms | all threads | by the clock | detokenizer | beyond plain | steps a token | in vain |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind, rows in found.items():
        thread, *others = (statistics.median(column) for column in zip(*rows, strict=True))
        more = statistics.median(row[0] - plain[0] for row, plain in zip(rows, found["plain"], strict=True))
        shown = [thread, *others[:3], more, *others[3:]]
        print(f"| {kind} | " + " | ".join(f"{number:.3f}" for number in shown) + " |")
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "rounds": found}))


if __name__ == "__main__":
    run_script(main)
