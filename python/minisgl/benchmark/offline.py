"""`minisgl bench offline`: the engine in this process, all requests at once, no HTTP."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from minisgl.benchmark import dataset, metrics
from minisgl.benchmark.dataset import Lengths, Sample
from minisgl.benchmark.floor import floor_of, kv_read, weights_read
from minisgl.benchmark.metrics import Record
from minisgl.benchmark.serve import add_common_options, machine_of, natural, positive, show_progress, temperature
from minisgl.benchmark.shapes import SHAPES, write_shape
from minisgl.config.args import ArgumentParser, ServerArgs, parse_args
from minisgl.config.device import kept_as
from minisgl.core import SamplingParams
from minisgl.errors import ConfigError, RequestError
from minisgl.message.messages import IdsPrompt, pack_ids

if TYPE_CHECKING:
    from minisgl.llm import LLM, RequestOutput


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with lengths in tokens, and ids below `vocab_size`. prefix_len: tokens that all prompts begin with."""

    about: str
    input_len: Lengths
    output_len: Lengths
    num_prompts: int = 32
    vocab_size: int = 256
    temperature: float = 0.0
    warmup: int = 1
    prefix_len: int = 0


_LONG = Lengths(100, 1024)
WORKLOADS = {
    "standard": Workload("256 random prompts and outputs of 100 to 1,024", _LONG, _LONG, 256, 10_001, 0.6, 8),
    "streams": Workload("--streams requests in step", Lengths(128, 128), Lengths(128, 128), 1, 10_001, 0.6, 8),
    "mixed": Workload("inputs and outputs of very different lengths", Lengths(16, 256), Lengths(16, 256)),
    "prefix": Workload("one long prefix, as of a system prompt", Lengths(8, 32), Lengths(16, 64), prefix_len=256),
    "prefill": Workload("long prompts, one output token", Lengths(512, 512), Lengths(1, 1)),
    "decode": Workload("short prompts, long outputs", Lengths(16, 16), Lengths(256, 256)),
    "steps": Workload("more and more at once, for minisgl simulate", Lengths(1, 1024), Lengths(1, 64), 280),
}
_WARMUP_INPUT, _WARMUP_OUTPUT = Lengths(16, 64), Lengths(16, 32)


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="minisgl bench offline",
        description="Measure the engine in this process. The server's flags (--model, --dtype, --tp …) are taken too. "
        "Options that are not given are the workload's.",
        epilog="workloads: " + "; ".join(f"{name}: {workload.about}" for name, workload in WORKLOADS.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workload", choices=tuple(WORKLOADS), default="mixed")
    add("--shape", help=f"random weights of a shape: {', '.join(SHAPES)}, or a directory with config.json")
    add("--num-prompts", "--streams", type=positive, help="requests")
    add("--input-len", type=dataset.parse_lengths, help="prompt tokens, N or LOW:HIGH")
    add("--output-len", "--tokens", type=dataset.parse_lengths, help="output tokens, N or LOW:HIGH")
    add("--prefix-len", type=natural, help="further tokens that all prompts begin with")
    add("--vocab-size", type=positive, help="prompts are random ids below this")
    add("--temperature", type=temperature)
    add("--warmup", type=natural, help="short requests before the measured ones")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the benchmark. Raises: ConfigError when it cannot be run."""
    args, engine_flags = make_parser().parse_known_args(argv)
    options = engine_options(parse_args(engine_flags))
    metrics.check_files(json=args.json, output=args.output)
    fill_in(args)
    args.engine, args.model = options, args.shape or options.get("model_path", "built-in demo model")
    title = f"minisgl bench offline: {args.model}, {args.workload}"
    try:
        with model_options(args.shape, options) as model:
            run = Run(args, model)
            args.scheduler = dataclasses.asdict(run.scheduler)
            names = [field.name for field in dataclasses.fields(run.engine) if field.name != "model"]
            args.resolved = {name: getattr(run.engine, name) for name in names}
    except RequestError as error:
        raise ConfigError(f"--workload {args.workload}: {error}") from None
    summary = metrics.summarize(run.records, run.duration, run.steps, run.floor, run.step_floor, run.ceilings)
    metrics.print_summary(title, summary)
    metrics.write_files(args, summary, run.records, run.shares or run.steps)
    return int(summary.num_failed == summary.num_requests)


def engine_options(args: ServerArgs) -> dict[str, Any]:
    """What differs from the defaults, by the names that `LLM` takes."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return {f.name: values[f.name] for f in dataclasses.fields(args) if values[f.name] != f.default}


def fill_in(args: argparse.Namespace) -> None:
    """What was not asked for is the workload's."""
    workload = WORKLOADS[args.workload]
    for name in ("input_len", "output_len", "num_prompts", "temperature", "warmup", "prefix_len"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(workload, name))
    if args.workload == "streams" and args.output_len.low != args.output_len.high:
        raise ConfigError(f"--tokens {args.output_len}: streams are of one length")


@contextlib.contextmanager
def model_options(shape: str | None, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`LLM`'s options, with a model directory for `shape`, or for a --model that has `config.json` alone."""
    path = options.get("model_path")
    if shape is None and options.get("dummy_weight") and path and (Path(path) / "config.json").is_file():
        shape = None if (Path(path) / "tokenizer.json").is_file() else path
    if shape is None:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="minisgl-shape-") as directory:
        yield {**options, "model_path": str(write_shape(shape, directory)), "dummy_weight": True}


def vocab_size_for(args: argparse.Namespace, model: int | None = None) -> int:
    """Prompts are random ids below this: what was asked for, or the workload's as far as the `model` has so many."""
    if args.vocab_size is None:
        own = WORKLOADS[args.workload].vocab_size
        return own if model is None else min(own, model)
    if model is not None and args.vocab_size > model:
        raise ConfigError(f"--vocab-size {args.vocab_size}: the model has {model} tokens")
    return int(args.vocab_size)


def make_samples(args: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """The measured requests, and the warm-up's. A function of the seed."""
    rng, vocab_size = Random(args.seed), vocab_size_for(args)
    measured = dataset.random_ids(args.num_prompts, args.input_len, args.output_len, rng, vocab_size, args.prefix_len)
    return measured, dataset.random_ids(args.warmup, _WARMUP_INPUT, _WARMUP_OUTPUT, rng, vocab_size)


class Run:
    """Loads the model, warms up and generates: `records` in order, the `duration` in seconds, and the floors.

    steps: seconds of each decode step of a streams workload, or of each step of `steps`. shares: of such a step, for
    each request, the first position that it computes and how many; and its seconds again.
    """

    def __init__(self, args: argparse.Namespace, options: dict[str, Any]) -> None:
        from minisgl.llm import LLM, Pending

        class TimedLLM(LLM):
            """Notes when each turn of the loop ended: with all requests in step, that is when their tokens came."""

            def turn(self) -> list[Pending]:
                ended = super().turn()
                turns.append(time.perf_counter())
                return ended

        turns: list[float] = []
        options = dict(options)
        with TimedLLM(options.pop("model_path", None), **options) as llm:
            self.engine, self.scheduler = llm.config.engine, llm.rank.config
            args.vocab_size = vocab_size_for(args, self.engine.model.vocab_size)
            measured, warmup = make_samples(args)
            if warmup:
                _generate(llm, warmup, args.temperature)
            turns.clear()
            self.shares: list[tuple[list[tuple[int, int]], float]] = []
            begun = time.perf_counter()
            if args.workload == "steps":
                outputs = self._time_steps(llm, measured, Random(args.seed))
            else:
                outputs = _generate(llm, measured, args.temperature)
            self.duration = time.perf_counter() - begun
        self.records = [to_record(output) for output in outputs]
        self.steps = [seconds for _, seconds in self.shares]
        if args.workload == "streams":  # the last turns are the steps after the first token, the same for all
            turns = turns[-args.output_len.high :]
            self.steps = [after - before for before, after in itertools.pairwise(turns)]
        self.floor, self.step_floor, self.ceilings = self._floors(args)

    def _time_steps(self, llm: LLM, samples: Sequence[Sample], rng: Random) -> list[RequestOutput]:
        """Generate one request at a time, then 2, 4 … 64. A step lasts from the end of the one before to its own."""
        waiting = list(samples)
        outputs: list[RequestOutput] = []
        inflight, last = llm.scheduler.planner.inflight, time.perf_counter()
        while len(outputs) < len(samples):
            if waiting and len(llm.pending) < 2 ** (6 - 7 * (len(waiting) - 1) // len(samples)):
                sample = waiting.pop()
                prompt = IdsPrompt(pack_ids(sample.prompt[rng.randrange(len(sample.prompt)) :]))
                llm.submit([prompt], SamplingParams(sample.output_len, 0.0, ignore_eos=True))
            plan = inflight[0].plan if inflight else None
            outputs += [ended.output() for ended in llm.turn()]
            last, begun = time.perf_counter(), last
            if plan is not None:
                self.shares.append(([(req.start, req.num_new) for req in plan.reqs], last - begun))
        return outputs

    def _floors(self, args: argparse.Namespace) -> tuple[float | None, float | None, str | None]:
        """Seconds of all, and of a step of streams; what they come from."""
        machine = machine_of(args, self.engine.device)
        if machine is None:
            return None, None, None
        engine, load, step = self.engine, [(r.num_prompt, r.num_output, r.num_cached) for r in self.records], None
        model, dtype, kv_dtype = engine.model, kept_as(engine), engine.kv_cache_dtype
        limits = engine.tp_size, engine.max_running_requests, kv_dtype
        if self.steps and not self.shares:
            contexts = [num_prompt + num_output // 2 for num_prompt, num_output, _ in load]
            num_bytes = weights_read(model, dtype, len(load), engine.tp_size)
            step = (num_bytes + kv_read(model, kv_dtype, contexts, engine.tp_size)) / machine.bandwidth
        return floor_of(model, dtype, load, machine, *limits).seconds, step, str(machine)


def to_record(output: RequestOutput) -> Record:
    """A finished request as a benchmark's record."""
    total, counts = output.metrics.total_time, (len(output.prompt_token_ids), len(output.token_ids))
    arrivals = (output.metrics.time_to_first_token, total) if output.token_ids else ()
    return Record(0.0, total, arrivals, *counts, output.cached_tokens, output.error, has_gaps=False)


def _generate(llm: LLM, samples: Sequence[Sample], temperature: float) -> list[RequestOutput]:
    params = [SamplingParams(sample.output_len, temperature, ignore_eos=True) for sample in samples]
    return llm.generate([sample.prompt for sample in samples], params, progress=show_progress)
