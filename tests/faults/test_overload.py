"""More requests than can be served: refused politely, by turns, and nobody is left without an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.faults.conftest import Server, fake
from tests.faults.load import Answer, Client, Memory, Probe, ask, get, post, raise_descriptor_limit, statuses
from tests.waiting import poll

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}
OTHER = "127.0.0.7"  # another client's address


@pytest.fixture(scope="module")
def narrow(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two requests run, eight may wait."""
    options = {"delay": 0.02, "max_running": 2, "max_queued_requests": 8, "max_queued_tokens": 1024}
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with Server.running(fake(model_path, **options), log) as server:
        yield server


async def crowd(server: Server, requests: list[bytes], address: str | None = None) -> list[Answer]:
    return await asyncio.gather(*(ask(server.url, request, address) for request in requests))


def hold(max_tokens: int = 400, **more: Any) -> bytes:
    """A request that runs until it is let go: for longer than any machine needs for what is tried meanwhile."""
    return post(CHAT, {**HELLO, "max_tokens": max_tokens, **more}, x_request_id="held")


async def is_held(server: Server, count: int) -> None:
    """Until so many requests are in the server."""
    await asyncio.to_thread(server.wait_load, count)


async def let_go(server: Server) -> None:
    assert (await ask(server.url, post("/abort_request", {"rid": "held"}))).status == 200


def test_what_finds_no_room_is_told_when_to_come_again(narrow: Server) -> None:
    async def run() -> tuple[list[Answer], Answer, Answer]:
        first = asyncio.ensure_future(crowd(narrow, [hold()] * 10))
        await is_held(narrow, 10)
        more = await crowd(narrow, [hold()] * 20)
        refused = await ask(narrow.url, post(MESSAGES, {"max_tokens": 5, "messages": HELLO["messages"]}))
        other = asyncio.ensure_future(ask(narrow.url, post(CHAT, {**HELLO, "max_tokens": 2}), OTHER))
        while narrow.load() < 11 and not other.done():
            await asyncio.sleep(0.02)
        await let_go(narrow)
        return [*await first, *more], refused, await other

    answers, of_anthropic, other = asyncio.run(run())
    assert statuses(answers) == {200: 10, 429: 20}
    for answer in [*answers, of_anthropic]:
        if answer.status == 429:
            assert 1 <= int(answer.header("retry-after") or 0) <= 60
            assert answer.seconds < min(each.seconds for each in answers if each.status == 200)
    error = json.loads(next(answer.body for answer in answers if answer.status == 429))["error"]
    assert error["code"] == "rate_limit_exceeded" and error["param"] is None and "try again in" in error["message"]
    assert json.loads(of_anthropic.body)["error"]["type"] == "rate_limit_error"
    assert other.status == 200, "one client's crowd leaves no room for another"


def test_those_who_are_refused_do_not_shorten_the_wait_of_others(model_path: Path, tmp_path: Path) -> None:
    options = {"delay": 0.02, "max_running": 2, "max_queued_requests": 8}
    with Server.running(fake(model_path, **options), tmp_path / "server.log") as server:

        async def run() -> list[Answer]:
            await ask(server.url, post(CHAT, {**HELLO, "max_tokens": 1}))
            held = asyncio.ensure_future(crowd(server, [hold()] * 10))
            await is_held(server, 10)
            await asyncio.sleep(2)
            refused = await crowd(server, [post(CHAT, HELLO)] * 200)
            held.cancel()
            return refused

        waits = [int(answer.header("retry-after") or 0) for answer in asyncio.run(run())]
    assert min(waits) > 1, "ten are there, and one has left in two seconds"


def test_there_is_a_place_for_another_client_however_small_the_queue_is(model_path: Path, tmp_path: Path) -> None:
    async def run(server: Server) -> tuple[list[Answer], Answer]:
        first = asyncio.ensure_future(crowd(server, [hold()] * 4))
        await is_held(server, 4)
        more = await crowd(server, [hold()] * 5)
        other = asyncio.ensure_future(ask(server.url, post(CHAT, {**HELLO, "max_tokens": 2}), OTHER))
        while server.load() < 5 and not other.done():
            await asyncio.sleep(0.02)
        await let_go(server)
        return [*await first, *more], await other

    options = {"delay": 0.02, "max_running": 1, "max_queued_requests": 3}
    with Server.running(fake(model_path, **options), tmp_path / "log") as server:
        answers, other = asyncio.run(run(server))
    assert statuses(answers) == {200: 4, 429: 5} and other.status == 200


def test_stock_clients_come_again(narrow: Server) -> None:
    with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            held = client.completions.create(model="fake-model", prompt="x", n=9, max_tokens=400, stream=True)
            client.completions.create(model="fake-model", prompt="x", n=3)
        held.close()
    narrow.wait_load(0)
    assert caught.value.code == "rate_limit_exceeded"


def test_prompts_are_bounded_together(narrow: Server) -> None:
    long = hold(user="u" * 1000)  # a quarter of what may wait

    async def run() -> list[Answer]:
        asked = [asyncio.ensure_future(ask(narrow.url, long)) for _ in range(7)]
        while narrow.load() + sum(one.done() for one in asked) < 7:
            await asyncio.sleep(0.05)
        await let_go(narrow)
        return await asyncio.gather(*asked)

    found = statuses(asyncio.run(run()))
    assert found[429] >= 2 and found[200] >= 3 and found[200] + found[429] == 7


def test_the_operator_is_let_in(narrow: Server) -> None:
    async def run() -> list[Answer]:
        first = asyncio.ensure_future(crowd(narrow, [hold()] * 12))
        await is_held(narrow, 10)
        asked = [get("/health"), get("/metrics"), post("/flush_cache", {}), post("/abort_request", {"abort_all": True})]
        answers = [await ask(narrow.url, request) for request in asked]
        await first
        return answers

    assert [answer.status for answer in asyncio.run(run())] == [200] * 4


def test_time_limits_of_requests(narrow: Server) -> None:
    with narrow.client() as client:
        create = client.chat.completions.create
        begin = time.monotonic()
        ask: dict[str, Any] = {"model": "fake-model", "messages": HELLO["messages"], "max_tokens": 400}
        with pytest.raises(openai.InternalServerError) as caught:
            create(**ask, extra_body={"timeout": 0.5, "ignore_eos": True})
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        with pytest.raises(openai.InternalServerError):
            create(**ask, extra_body={"ignore_eos": True}, extra_headers={"x-request-timeout": "0.5"})
        with pytest.raises(openai.InternalServerError):
            create(**ask, extra_body={"ignore_eos": True}, extra_headers={"x-stainless-read-timeout": "0.5"})
        with pytest.raises(openai.APIError, match="no answer within"):
            list(create(**ask, stream=True, extra_body={"timeout": 0.5, "ignore_eos": True}))
        assert time.monotonic() - begin < 4 * 5
        with pytest.raises(openai.BadRequestError, match="x-request-timeout must be a number of seconds"):
            create(**ask, extra_headers={"x-request-timeout": "soon"})
        with pytest.raises(openai.BadRequestError, match="timeout"):
            create(**ask, extra_body={"timeout": -1})
    for name in ("num_running_requests", "num_waiting_requests"):
        narrow.wait_load(0, name)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (MESSAGES, {"messages": HELLO["messages"], "max_tokens": 400, "ignore_eos": True}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 400, "ignore_eos": True}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}),
        ("/generate", {"text": "hello", "sampling_params": {"max_tokens": 400, "ignore_eos": True}}),
    ],
)
def test_time_limits_in_other_words(narrow: Server, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{narrow.url}{path}", json={**body, "timeout": 0.3}, timeout=60)
    assert answer.status_code == 504 and "no answer within 0.3 s" in answer.text
    events = httpx.post(f"{narrow.url}{path}", json={**body, "timeout": 0.3, "stream": True}, timeout=60)
    assert events.status_code == 200 and "no answer within 0.3 s" in events.text


def test_one_request_of_many_outputs_waits_for_others(narrow: Server, model_path: Path, tmp_path: Path) -> None:
    options = {"delay": 0.01, "max_running": 16, "max_queued_requests": 4096}
    many = {"prompt": ["x"] * 2, "n": 64, "max_tokens": 100, "ignore_eos": True}

    async def run(server: Server) -> tuple[float, Probe]:
        small = Probe(server.url, post(CHAT, {**HELLO, "max_tokens": 2, "stream": True}), 0.05, OTHER)
        begin = time.perf_counter()
        large = asyncio.ensure_future(ask(server.url, post("/v1/completions", many)))
        await is_held(server, 128)
        probe = asyncio.ensure_future(small.run())
        assert (await large).status == 200
        probe.cancel()
        return time.perf_counter() - begin, small

    with Server.running(fake(model_path, **options), tmp_path / "server.log") as server:
        seconds, small = asyncio.run(run(server))
    first = small.percentile(0.5, "first")
    print(f"{len(small.answers)} answers, half of them begun within {first:.2f} of {seconds:.2f} s")
    assert len(small.answers) >= 5 and statuses(small.answers) == {200: len(small.answers)}
    assert first < seconds / 6


def test_thousands_at_once_are_all_answered(tmp_path: Path) -> None:
    """2,000 connections and 10,000 outputs on the built-in model, beside a client that asks for little."""
    raise_descriptor_limit(8192)
    flags = ["--port", "0", "--max-queued-requests", "12000", "--num-tokenizer", "0"]
    small = post(CHAT, {**HELLO, "max_tokens": 4, "stream": True})
    each = post(CHAT, {**HELLO, "max_tokens": 2, "n": 5})

    async def one(server: Server) -> Answer:
        client = Client(server.url)
        answer = await client.send(each)
        await client.close()
        return answer

    async def run(server: Server) -> tuple[list[Answer], float, Probe, Probe, Memory]:
        memory = Memory(server.process.pid)
        health = Probe(server.url, get("/health"), 0.1, OTHER)
        other = Probe(server.url, small, 0.3, OTHER)
        begin = time.perf_counter()
        tasks = [asyncio.ensure_future(work) for work in (health.run(), other.run(), memory.watch())]
        answers = await asyncio.gather(*(one(server) for _ in range(2000)))
        for task in tasks:
            task.cancel()
        return answers, time.perf_counter() - begin, health, other, memory

    with Server.running(["-m", "minisgl", *flags], tmp_path / "server.log") as server:
        answers, seconds, health, other, memory = asyncio.run(run(server))
    p99, first = health.percentile(0.99), other.percentile(0.99, "first")
    grown = {name: (most - memory.before[name]) >> 20 for name, most in memory.most.items()}
    print(f"{seconds:.1f} s, /health p99 {p99:.2f} s, first token of another's p99 {first:.2f} s, grown by {grown} MiB")
    assert statuses(answers) == {200: 2000}
    assert statuses(health.answers) == {200: len(health.answers)}
    assert statuses(other.answers) == {200: len(other.answers)}
    # Who has to wait for the crowd waits for all of that time; what else the machine does makes all of it longer.
    assert p99 < max(3.0, seconds / 4) and first < max(3.0, seconds / 4)
    assert max(grown.values()) < 400


LIMITED = (
    "import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160)); "
    "runpy.run_module({0!r}, run_name='__main__', alter_sys=True)"
)


def test_more_connections_than_descriptors(model_path: Path, tmp_path: Path) -> None:
    """Each gets an answer: 200, or 503 with Retry-After; then all is as it was."""
    module, *options = fake(model_path, delay=0.2)[1:]  # none has ended before the last one has come
    request = post(CHAT, {**HELLO, "max_tokens": 20})

    async def run(server: Server) -> list[Answer]:
        return await crowd(server, [request] * 400)

    with Server.running(["-c", LIMITED.format(module), *options], tmp_path / "server.log") as server:
        answers = asyncio.run(run(server))
        found = statuses(answers)
        assert found.keys() == {200, 503} and found[200] >= 50, found
        assert all(answer.header("retry-after") == "1" for answer in answers if answer.status == 503)
        poll(lambda: psutil.Process(server.process.pid).num_fds() < 140, "what has ended is still open")
        assert asyncio.run(ask(server.url, post(CHAT, {**HELLO, "max_tokens": 1}))).status == 200
