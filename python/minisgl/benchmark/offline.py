"""`minisgl bench offline`: the engine in this process, all requests at once, no HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minisgl.benchmark import dataset, metrics
from minisgl.benchmark.dataset import Lengths, Sample
from minisgl.benchmark.metrics import Record
from minisgl.benchmark.serve import add_output_options, natural, positive, report
from minisgl.config.args import ArgumentParser, ServerArgs, parse_args
from minisgl.core import SamplingParams
from minisgl.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from minisgl.llm import LLM, RequestOutput


@dataclass(frozen=True, slots=True)
class Workload:
    """Kinds of requests: `parts` are equal shares of the load, each with its input and output lengths in tokens.

    prefix_len: tokens that all prompts begin with.
    """

    about: str
    parts: tuple[tuple[Lengths, Lengths], ...]
    prefix_len: int = 0


WORKLOADS = {
    "standard": Workload("inputs and outputs of very different lengths", ((Lengths(16, 256), Lengths(16, 256)),)),
    "mixed": Workload(
        "short chats, long documents and long answers together",
        ((Lengths(16, 64), Lengths(32, 64)), (Lengths(256, 512), Lengths(8, 32)), (Lengths(16, 32), Lengths(128, 256))),
    ),
    "prefix": Workload("one long prefix, as of a system prompt", ((Lengths(8, 32), Lengths(16, 64)),), prefix_len=256),
    "prefill": Workload("long prompts, one output token", ((Lengths(512, 512), Lengths(1, 1)),)),
    "decode": Workload("short prompts, long outputs", ((Lengths(16, 16), Lengths(256, 256)),)),
}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="minisgl bench offline",
        description="Measure the engine in this process. The server's flags (--model, --dtype, --tp …) are taken too.",
        epilog="workloads: " + "; ".join(f"{name}: {workload.about}" for name, workload in WORKLOADS.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workload", choices=tuple(WORKLOADS), default="standard")
    add("--num-prompts", type=positive, default=32, help="requests (default: %(default)s)")
    add("--input-len", type=dataset.parse_lengths, help="prompt tokens, N or LOW:HIGH, in place of the workload's")
    add("--output-len", type=dataset.parse_lengths, help="output tokens, N or LOW:HIGH, in place of the workload's")
    add("--vocab-size", type=positive, default=256, help="prompts are random ids below this (default: %(default)s)")
    add("--temperature", type=float, default=0.0)
    add("--warmup", type=natural, default=1, help="requests before the measured ones (default: %(default)s)")
    add("--seed", type=natural, default=0)
    add_output_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the benchmark. Raises: ConfigError when it cannot be run."""
    args, engine_flags = make_parser().parse_known_args(argv)
    options = engine_options(parse_args(engine_flags))
    metrics.check_files(args.output, args.plot)
    samples = make_samples(args)
    args.engine = options
    try:
        records, duration = run(args, options, samples)
    except RequestError as error:
        raise ConfigError(f"--workload {args.workload}: {error}") from None
    title = f"minisgl bench offline: {options.get('model_path', 'built-in demo model')}, {args.workload}"
    return report(args, title, records, duration)


def engine_options(args: ServerArgs) -> dict[str, Any]:
    """What differs from the defaults, by the names that `LLM` takes."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return {f.name: values[f.name] for f in dataclasses.fields(args) if values[f.name] != f.default}


def make_samples(args: argparse.Namespace) -> list[Sample]:
    """The measured requests, parts of the workload in turn, the warm-up's behind them. A function of the seed."""
    if args.vocab_size <= dataset.FIRST_ID:
        raise ConfigError(f"--vocab-size {args.vocab_size}: must be above {dataset.FIRST_ID}")
    workload = WORKLOADS[args.workload]
    count = args.num_prompts + args.warmup
    share = -(-count // len(workload.parts))
    columns = [
        dataset.random_ids(
            share,
            args.input_len or inputs,
            args.output_len or outputs,
            # The prefix is drawn first: the same for all parts if each begins with the same generator.
            np.random.default_rng(args.seed if workload.prefix_len else [args.seed, part]),
            args.vocab_size,
            workload.prefix_len,
        )
        for part, (inputs, outputs) in enumerate(workload.parts)
    ]
    return [sample for row in zip(*columns, strict=True) for sample in row][:count]


def run(args: argparse.Namespace, options: dict[str, Any], samples: Sequence[Sample]) -> tuple[list[Record], float]:
    """Load the model, warm up, generate. Returns records in order, and the seconds that generation took."""
    from minisgl.llm import LLM

    options = dict(options)
    with LLM(options.pop("model_path", None), **options) as llm:
        measured, warmup = samples[: args.num_prompts], samples[args.num_prompts :]
        if warmup:
            _generate(llm, warmup, args.temperature, progress=False)
        begun = time.perf_counter()
        outputs = _generate(llm, measured, args.temperature, progress=None)
        duration = time.perf_counter() - begun
    return [to_record(output) for output in outputs], duration


def to_record(output: RequestOutput) -> Record:
    """A finished request as a benchmark's record."""
    total = output.metrics.total_time
    return Record(
        start=0.0,
        e2e=total,
        arrivals=(output.metrics.time_to_first_token, total) if output.token_ids else (),
        num_prompt=len(output.prompt_token_ids),
        num_output=len(output.token_ids),
        num_cached=output.cached_tokens,
        error=output.error,
        has_gaps=False,
    )


def _generate(llm: LLM, samples: Sequence[Sample], temperature: float, progress: bool | None) -> list[RequestOutput]:
    params = [SamplingParams(sample.output_len, temperature, ignore_eos=True) for sample in samples]
    prompts = [sample.token_ids for sample in samples]
    return llm.generate(prompts, params, progress=progress)
