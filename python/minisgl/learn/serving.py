"""Checks of lessons 1 to 6: processes, stages, messages, pages, plans and time. No torch."""

import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Masks, SamplingParams, StepPlan, StepResult
from minisgl.kvcache.radix import PrefixCache
from minisgl.learn import compare
from minisgl.message import messages
from minisgl.scheduler.planner import Planner
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport

GREEDY = SamplingParams(temperature=0.0, seed=0, ignore_eos=True)


@contextmanager
def serving(*flags: str) -> Iterator[tuple[int, str]]:
    """A server of the built-in model: its process id, and its address without `/v1`."""
    command = [sys.executable, "-m", "minisgl", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = next(line.split()[-1] for line in process.stdout or () if "http" in line)
            yield process.pid, url.removesuffix("/v1")
        finally:
            process.terminate()


def check_workers(workers: Callable[[int], dict[str, int]]) -> str:
    with serving("--num-tokenizer", "2") as (pid, _):
        titles = {child.cmdline()[0]: child.pid for child in psutil.Process(pid).children()}
        expected = {title: child for title, child in titles.items() if title.startswith("minisgl-")}
        compare(f"workers({pid})", expected, workers(pid))
    return f"It found {', '.join(sorted(expected))}."


def check_durations(durations: Callable[[dict[str, Any]], dict[str, float]]) -> str:
    with serving("--max-prefill-length", "64") as (_, url):
        for num_words in (5, 200, 200):  # the last one finds its prompt in the cache
            body = {"prompt": "the fox and the bear " * num_words, "max_tokens": 8, "ignore_eos": True}
            answer = httpx.post(f"{url}/v1/completions", json=body).json()
            time.sleep(0.5)  # the last stage is written down just after the answer is sent
            trace = httpx.get(f"{url}/trace/{answer['id']}").json()
            (output,) = trace["outputs"]
            at = {event["name"]: event["time"] for event in output["events"]}
            first_token, waited = output["events"][-1]["first"] - at["received"], at["admitted"] - at["queued"]
            computed = sum(event["num_new"] for event in output["events"] if event["name"] == "prefill")
            expected = {"first_token": first_token, "waited": waited, "computed": computed}
            compare("durations(trace)", expected, durations(trace))
    return "Three requests: a short prompt, a long one, and the long one from the cache."


def check_read_frame(read_frame: Callable[[bytes], list[tuple[str, int]]]) -> str:
    text, user = messages.TokenizeMsg(8, messages.TextPrompt("Once"), GREEDY), messages.UserMsg(9, b"", GREEDY)
    to_tokenizer, to_scheduler = messages.tokenizer_codec.encode, messages.backend_codec.encode
    frames = [to_tokenizer([text, messages.AbortMsg(9)]), to_scheduler([user, messages.PingMsg(10)]), to_scheduler([])]
    for frame in frames:
        expected = [(message["type"], message["uid"]) for message in msgspec.msgpack.decode(frame)]
        compare(f"read_frame({frame[:24]!r}…)", expected, read_frame(frame))
    return f"It read {len(frames)} frames of two channels."


def check_cached_tokens(cached_tokens: Callable[[list[list[int]], list[int], int], int]) -> str:
    rng = random.Random(4)
    for _ in range(300):
        page_size = rng.choice([1, 2, 4, 16])
        stem = rng.choices(range(3), k=60)  # prompts that often begin alike
        *before, prompt = ([*stem[: rng.randrange(60)], *rng.choices(range(3), k=rng.randint(1, 9))] for _ in range(5))
        cache = PrefixCache(page_size)
        for first_page, tokens in zip(range(0, 1000, 100), before, strict=False):
            ids = np.array(tokens, np.int32)
            cache.lock(handle := cache.match(b"", ids).handle)
            cache.insert(b"", handle, ids, [*range(first_page, first_page + len(tokens))])
        expected = cache.match_len(b"", np.array(prompt[:-1], np.int32))
        compare(f"cached_tokens({before}, {prompt}, {page_size})", expected, cached_tokens(before, prompt, page_size))
    return "300 prompts: it finds what the radix tree finds."


def check_grant(grant: Callable[[list[int], int], list[int]]) -> str:
    rng = random.Random(5)
    for _ in range(50):
        budget = rng.choice([8, 32, 100])
        planner = Planner(SchedulerConfig(8, budget, 256, 512, 4, cache_type="naive"))
        for uid in range(rng.randint(1, 8)):
            planner.add(uid, rng.choices(range(50), k=rng.randint(1, 120)), replace(GREEDY, max_tokens=4))
        while True:
            waiting = planner.waiting.turn().values() if planner.waiting else ()
            order = [req for req in (*planner.running, *waiting) if req.num_tokens < req.max_len]
            left = [req.num_tokens - req.num_computed for req in order]
            if (planned := planner.plan()) is None:
                break
            shares = {req.uid: share.num_new for req, share in zip(planned.reqs, planned.plan.reqs, strict=True)}
            compare(f"grant({left}, {budget})", [shares.get(req.uid, 0) for req in order], list(grant(left, budget)))
            planner.retire(StepResult(planned.plan.step_id, [(1,)] * len(planned.sampling)))
    return "50 loads, step by step: it grants what the planner grants."


class _Device:
    """One on paper: a step's host time passes when it is submitted, its device time beside what comes after."""

    def __init__(self, host: Sequence[float], device: Sequence[float]) -> None:
        self._times, self._running = list(zip(host, device, strict=True)), deque[tuple[float, StepResult]]()
        self._free, self._now, self.known = 0.0, 0.0, list[float]()

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> "_Device":  # noqa: ARG002
        host, device = self._times[plan.step_id]
        self._now += host
        self._free = max(self._now, self._free) + device
        self._running.append((self._free, StepResult(plan.step_id, [(1,)])))
        return self

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return True

    def result(self) -> StepResult:
        done_at, result = self._running.popleft()
        self._now = max(self._now, done_at)
        self.known.append(self._now)
        return result

    def close(self) -> None:
        self._running.clear()


def check_finish_times(finish_times: Callable[[list[float], list[float], bool], list[float]]) -> str:
    rng = random.Random(6)
    for turn in range(40):
        overlap, count = turn % 2 == 1, rng.randint(1, 8)
        host, times = ([float(rng.randint(1, 9)) for _ in range(count)] for _ in range(2))
        device, transport = _Device(host, times), LocalTransport()
        scheduler = Scheduler(SchedulerConfig(1, 64, 64, 64, 1, overlap=overlap), device, transport)
        transport.put([messages.UserMsg(0, messages.pack_ids([1, 2, 3]), replace(GREEDY, max_tokens=count))])
        while len(device.known) < count:
            scheduler.turn()
        compare(f"finish_times({host}, {times}, {overlap})", device.known, finish_times(host, times, overlap))
    return "40 runs: it agrees with the scheduler's own loop, with overlap and without."
