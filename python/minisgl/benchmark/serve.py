"""`minisgl bench serve`: an open-loop or bounded load on a running server."""

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import httpx

from minisgl.benchmark import dataset, metrics
from minisgl.benchmark.floor import Machine, floor_of, measure_gpu
from minisgl.benchmark.metrics import Record
from minisgl.benchmark.shapes import read_shape
from minisgl.config.args import ArgumentParser, argument, integer, parser_of
from minisgl.errors import ConfigError

natural, positive = argument(integer(0)), argument(integer(1))
temperature = argument(parser_of("a number from 0 to 100", lambda value: 0 <= value <= 100, float))
_rate = argument(parser_of("a number above 0, or inf", lambda value: value > 0, float))


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="minisgl bench serve", description="Measure a running OpenAI-compatible server.")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:1919/v1", help="the server, with or without /v1 (default: %(default)s)")
    add("--model", help="model id (default: the first of /v1/models)")
    add("--shape", help="directory with the model's config.json, or a shape's name: for the floor")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--dataset", default="random", help="random, or a JSONL file with `prompt` or `messages` in each line")
    add("--trace", metavar="FILE.jsonl", help="timestamp (s), prompt_len, output_len a line; or Mooncake's")
    add("--num-prompts", type=positive, help="requests to send (default: 64, or all of a trace)")
    add("--input-len", type=dataset.parse_lengths, default="128", help="prompt tokens, N or LOW:HIGH")
    add("--output-len", type=dataset.parse_lengths, default="64", help="output tokens, N or LOW:HIGH")
    add("--vocab-size", type=positive, default=256, help="random prompts use ids below this (default: %(default)s)")
    add("--request-rate", type=_rate, default=math.inf, help="requests/s with Poisson arrivals; inf: all at once")
    add("--max-concurrency", type=positive, help="most requests in flight")
    add("--temperature", type=temperature, default=0.0)
    add("--ignore-eos", action="store_true", help="always generate --output-len tokens")
    add("--warmup", type=natural, default=1, help="requests before the measured ones (default: %(default)s)")
    add("--time-limit", type=_rate, default=3600.0, help="seconds until what is unfinished counts as failed")
    add_common_options(parser)
    parser.set_defaults(machine=None)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks take."""
    add = parser.add_argument
    add("--seed", type=natural, default=0)
    add("--json", metavar="FILE.jsonl", help="append configuration and summary as one line")
    add("--output", metavar="FILE.json", help="write configuration, summary and raw numbers")
    add("--bandwidth", type=_rate, help="of a GPU, bytes/s, for the floor (default: measured on the GPU at hand)")
    add("--peak-flops", type=_rate, help="of a GPU, FLOP/s, for the floor (default: measured on the GPU at hand)")


def machine_of(args: argparse.Namespace, device: str) -> Machine | None:
    """The ceilings that were given, or the measured ones of the GPU at hand; None, and so no floor, without either."""
    if args.bandwidth and args.peak_flops:
        return Machine(args.bandwidth, args.peak_flops, "as given")
    machine = measure_gpu() if device == "cuda" else None
    if machine is None:
        return None
    return replace(machine, bandwidth=args.bandwidth or machine.bandwidth, flops=args.peak_flops or machine.flops)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark. Raises: ConfigError when it cannot be run at all."""
    args = make_parser().parse_args(argv)
    metrics.check_files(json=args.json, output=args.output)
    if args.shape is not None:
        args.machine = machine_of(args, "cuda")
        if args.machine is None:
            raise ConfigError("--shape: without a GPU at hand the floor needs --bandwidth and --peak-flops")
    samples = make_samples(args)
    records, duration = asyncio.run(run(args, samples))
    return report(args, f"minisgl bench serve: {args.model}, {args.endpoint}", records, duration)


def report(args: argparse.Namespace, title: str, records: Sequence[Record], duration: float) -> int:
    """Print and write what was measured. Returns 1 when every request failed."""
    floor = ceilings = None
    if args.machine is not None:  # with the shape's own dtype on one GPU, as if all requests had come at once
        model = read_shape(args.shape)
        load = [(r.num_prompt, r.num_output, r.num_cached) for r in records if r.error is None]
        floor, ceilings = floor_of(model, model.dtype, load, args.machine).seconds, str(args.machine)
    summary = metrics.summarize(records, duration, floor=floor, ceilings=ceilings)
    metrics.print_summary(title, summary)
    metrics.write_files(args, summary, records)
    return int(summary.num_failed == summary.num_requests)


def make_samples(args: argparse.Namespace) -> list[dataset.Sample]:
    """The measured requests, the warm-up's behind them. The same seed gives the same requests."""
    rng, lengths = Random(args.seed), (args.input_len, args.output_len)
    if args.trace:
        load = (args.output_len, rng, args.vocab_size, args.endpoint == "chat")
        samples = dataset.load_jsonl("--trace", args.trace, args.num_prompts, *load)[: args.num_prompts]
        args.num_prompts = len(samples)
        samples += (samples * args.warmup)[: args.warmup]
    else:
        args.num_prompts = args.num_prompts or 64
        count = args.num_prompts + args.warmup
        if args.dataset != "random":
            samples = dataset.load_jsonl("--dataset", args.dataset, count, args.output_len, rng, args.vocab_size)
        elif args.endpoint == "chat":
            samples = dataset.random_chats(count, *lengths, rng)
        else:
            samples = dataset.random_ids(count, *lengths, rng, args.vocab_size)
    if args.endpoint == "completions" and any(sample.is_chat for sample in samples):
        raise ConfigError(f"--dataset {args.trace or args.dataset}: `messages` need --endpoint chat")
    return samples


async def run(args: argparse.Namespace, samples: Sequence[dataset.Sample]) -> tuple[list[Record], float]:
    """Warm up, send the load and wait for it. Returns the records in order of sending, and the seconds it took.

    Sets `args.model` where it was open. Raises: ConfigError when the server cannot be reached.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(args.time_limit, connect=30.0)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False) as client:
        base_url, model = await find_server(client, args.base_url, args.model)
        args.model = model
        url = base_url + ("/chat/completions" if args.endpoint == "chat" else "/completions")
        bodies = [request_body(s, args.model, args.endpoint, args.temperature, args.ignore_eos) for s in samples]
        for body in bodies[args.num_prompts :]:
            await measure(client, url, body, time.perf_counter())
        offsets = arrival_offsets(samples[: args.num_prompts], args.request_rate, args.seed)
        return await _send_all(args, client, url, bodies[: args.num_prompts], offsets)


async def find_server(client: httpx.AsyncClient, given: str, model: str | None) -> tuple[str, str]:
    """Where the API is, for a `--base-url` with or without `/v1`, and the model: unless named, the first of the list.

    Raises: ConfigError when no list of models answers there, unless the model is named: some servers have no list.
    """
    base_url = re.sub(r"(/chat)?/completions$", "", given.rstrip("/"))
    problem = ""
    for url in dict.fromkeys((base_url.removesuffix("/v1") + "/v1", base_url)):
        try:
            response = await client.get(f"{url}/models", timeout=30)
            response.raise_for_status()
            return url, model or str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problem = problem or f"--base-url {given}: {url}/models does not answer: {reason}"
    if model is None:
        raise ConfigError(problem)
    return base_url, model


async def _send_all(
    args: argparse.Namespace,
    client: httpx.AsyncClient,
    url: str,
    bodies: Sequence[dict[str, object]],
    offsets: Sequence[float],
) -> tuple[list[Record], float]:
    gate = asyncio.Semaphore(args.max_concurrency or len(bodies))
    epoch = time.perf_counter()
    num_done = itertools.count(1)

    async def one(body: dict[str, object], offset: float) -> Record:
        await asyncio.sleep(epoch + offset - time.perf_counter())
        async with gate:
            record = await measure(client, url, body, epoch)
        show_progress(next(num_done), len(bodies))
        return record

    tasks = [asyncio.create_task(one(body, offset)) for body, offset in zip(bodies, offsets, strict=True)]
    await asyncio.wait(tasks, timeout=args.time_limit)
    duration = time.perf_counter() - epoch
    late = [task for task in tasks if task.cancel()]
    await asyncio.gather(*late, return_exceptions=True)
    lost = Record(0.0, duration, error=f"not finished within --time-limit {args.time_limit:g} s")
    return [lost if task.cancelled() else task.result() for task in tasks], duration


def arrival_offsets(samples: Sequence[dataset.Sample], rate: float, seed: int) -> list[float]:
    """When requests are sent, in seconds, the first at 0: as their timestamps say, or a Poisson process of `rate`."""
    times = [sample.timestamp for sample in samples if sample.timestamp is not None]
    if len(times) < len(samples):
        rng = Random(seed + 1)
        times = list(itertools.accumulate(rng.expovariate(rate) if rate < math.inf else 0.0 for _ in samples))
    return [offset - min(times) for offset in times]


def show_progress(finished: int, total: int) -> None:
    """A line on a terminal. A bar would be redrawn by a thread of its own, in the way of what is measured."""
    if sys.stderr.isatty():
        print(f"\r{finished}/{total} requests", end="" if finished < total else "\n", file=sys.stderr, flush=True)


class RequestFailed(Exception):
    """The server refused the request, or broke off its answer."""


def request_body(
    sample: dataset.Sample, model: str, endpoint: str, temperature: float, ignore_eos: bool
) -> dict[str, Any]:
    """The JSON body. A text prompt becomes a user message where the endpoint is `chat`."""
    body: dict[str, Any] = {"model": model, "max_tokens": sample.output_len, "temperature": temperature}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if ignore_eos:
        body["ignore_eos"] = True
    if endpoint == "completions":
        return body | {"prompt": sample.prompt}
    messages = sample.prompt if sample.is_chat else [{"role": "user", "content": sample.prompt}]
    return body | {"messages": messages}


async def measure(client: httpx.AsyncClient, url: str, body: dict[str, Any], epoch: float) -> Record:
    """Send one request and read its stream. Failures are records too. `epoch`: when the benchmark began."""
    begun = time.perf_counter()
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    error: str | None = None
    try:
        async for text, counts in _events(client, url, body):
            if text:
                arrivals.append(time.perf_counter() - begun)
            usage = counts or usage
    except RequestFailed as failure:
        error = str(failure)
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}".rstrip(": ")
    return Record(
        start=begun - epoch,
        e2e=time.perf_counter() - begun,
        arrivals=tuple(arrivals),
        num_prompt=usage.get("prompt_tokens") or 0,
        num_output=usage.get("completion_tokens") or len(arrivals),
        num_cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        error=error,
    )


async def _events(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The text and usage of each event. Raises: RequestFailed unless the answer comes to its end."""
    finished = False
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise RequestFailed(f"HTTP {response.status_code}: {_error_text(await response.aread())}")
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                break
            text, ended, usage = _parse_event(data)
            finished = finished or ended
            yield text, usage
    if not finished:
        raise RequestFailed("the stream ended before the answer did")


def _parse_event(data: str) -> tuple[str, bool, dict[str, Any]]:
    """Text, whether it is the answer's last, and usage."""
    try:
        event = json.loads(data)
    except ValueError:
        raise RequestFailed(f"an event is not JSON: {data[:80]!r}") from None
    if not isinstance(event, dict) or event.get("error"):
        raise RequestFailed(_error_text(data.encode()))
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
    return text, bool(choice.get("finish_reason")), event.get("usage") or {}


def _error_text(content: bytes) -> str:
    """The message of an OpenAI-shaped error, or the start of whatever came."""
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace").strip()
