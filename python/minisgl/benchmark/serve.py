"""`minisgl bench serve`: an open-loop or bounded load on a running server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence

import httpx
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minisgl.benchmark import dataset, metrics
from minisgl.benchmark.client import measure, request_body
from minisgl.benchmark.metrics import Record
from minisgl.config.args import ArgumentParser, argument, integer
from minisgl.errors import ConfigError

natural, positive = argument(integer(0)), argument(integer(1))


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="minisgl bench serve", description="Measure a running OpenAI-compatible server.")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:1919/v1", help="the server's /v1 (default: %(default)s)")
    add("--model", help="model id (default: the first of /v1/models)")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--dataset", default="random", help="random, or a JSONL file with `prompt` or `messages` in each line")
    add("--num-prompts", type=positive, default=64, help="requests to send (default: %(default)s)")
    add("--input-len", type=dataset.parse_lengths, default="128", help="prompt tokens, N or LOW:HIGH")
    add("--output-len", type=dataset.parse_lengths, default="64", help="output tokens, N or LOW:HIGH")
    add("--vocab-size", type=positive, default=256, help="random prompts use ids below this (default: %(default)s)")
    add("--request-rate", type=_rate, default=math.inf, help="requests/s with Poisson arrivals; inf: all at once")
    add("--max-concurrency", type=positive, help="most requests in flight")
    add("--temperature", type=float, default=0.0)
    add("--ignore-eos", action="store_true", help="always generate --output-len tokens")
    add("--warmup", type=natural, default=1, help="requests before the measured ones (default: %(default)s)")
    add("--seed", type=natural, default=0)
    add("--time-limit", type=float, default=3600.0, help="seconds until what is unfinished counts as failed")
    add_output_options(parser)
    return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks can write."""
    parser.add_argument("--output", metavar="FILE.json", help="write configuration, summary and raw numbers")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the latency distributions (needs minisgl[plot])")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark. Raises: ConfigError when it cannot be run at all."""
    args = make_parser().parse_args(argv)
    metrics.check_files(args.output, args.plot)
    samples = make_samples(args)
    records, duration = asyncio.run(run(args, samples))
    title = f"minisgl bench serve: {args.model}, {args.endpoint}"
    return report(args, title, records, duration)


def report(args: argparse.Namespace, title: str, records: Sequence[Record], duration: float) -> int:
    """Print, write and draw what was measured. Returns 1 when every request failed."""
    summary = metrics.summarize(records, duration)
    metrics.print_summary(title, summary)
    if args.output:
        config = {name: value if isinstance(value, int | None) else str(value) for name, value in vars(args).items()}
        metrics.write_json(args.output, config, summary, records)
    if args.plot:
        metrics.write_plot(args.plot, title, records)
    return int(summary.num_failed == summary.num_requests)


def make_samples(args: argparse.Namespace) -> list[dataset.Sample]:
    """The measured requests, the warm-up's behind them. The same seed gives the same requests."""
    rng = np.random.default_rng(args.seed)
    count = args.num_prompts + args.warmup
    if args.dataset != "random":
        samples = dataset.load_jsonl(args.dataset, count, args.output_len, rng)
        if args.endpoint == "completions" and any(sample.is_chat for sample in samples):
            raise ConfigError(f"--dataset {args.dataset}: `messages` need --endpoint chat")
        return samples
    if args.vocab_size <= dataset.FIRST_ID:
        raise ConfigError(f"--vocab-size {args.vocab_size}: must be above {dataset.FIRST_ID}")
    if args.endpoint == "chat":
        return dataset.random_chats(count, args.input_len, args.output_len, rng)
    return dataset.random_ids(count, args.input_len, args.output_len, rng, args.vocab_size)


async def run(args: argparse.Namespace, samples: Sequence[dataset.Sample]) -> tuple[list[Record], float]:
    """Warm up, send the load and wait for it. Returns the records in order of sending, and the seconds it took.

    Sets `args.model` where it was open. Raises: ConfigError when the server cannot be reached.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(args.time_limit, connect=30.0)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False) as client:
        args.model = args.model or await first_model(client, args.base_url)
        path = "/chat/completions" if args.endpoint == "chat" else "/completions"
        url = args.base_url.rstrip("/") + path
        bodies = [request_body(s, args.model, args.endpoint, args.temperature, args.ignore_eos) for s in samples]
        for body in bodies[args.num_prompts :]:
            await measure(client, url, body, time.perf_counter())
        return await _send_all(args, client, url, bodies[: args.num_prompts])


async def first_model(client: httpx.AsyncClient, base_url: str) -> str:
    """The id of the first model that the server lists. Raises: ConfigError when there is no such server."""
    url = base_url.rstrip("/") + "/models"
    try:
        response = await client.get(url, timeout=30)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--base-url {base_url}: {url} does not answer: {reason}") from None


async def _send_all(
    args: argparse.Namespace, client: httpx.AsyncClient, url: str, bodies: Sequence[dict[str, object]]
) -> tuple[list[Record], float]:
    gate = asyncio.Semaphore(args.max_concurrency or len(bodies))
    epoch = time.perf_counter()
    with _progress() as progress:
        bar = progress.add_task("requests", total=len(bodies))

        async def one(body: dict[str, object], offset: float) -> Record:
            await asyncio.sleep(epoch + offset - time.perf_counter())
            async with gate:
                record = await measure(client, url, body, epoch)
            progress.advance(bar)
            return record

        offsets = arrival_offsets(len(bodies), args.request_rate, args.seed)
        tasks = [asyncio.create_task(one(body, offset)) for body, offset in zip(bodies, offsets, strict=True)]
        await asyncio.wait(tasks, timeout=args.time_limit)
        duration = time.perf_counter() - epoch
        late = [task for task in tasks if task.cancel()]
        await asyncio.gather(*late, return_exceptions=True)
    lost = Record(0.0, duration, error=f"not finished within --time-limit {args.time_limit:g} s")
    return [lost if task.cancelled() else task.result() for task in tasks], duration


def arrival_offsets(count: int, rate: float, seed: int) -> list[float]:
    """When requests are sent, in seconds: a Poisson process of `rate` per second, the first at 0."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count)
    return [float(offset) for offset in np.cumsum(gaps) - gaps[0]]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected requests per second above 0, or inf")
