"""A cluster of two replicas, as its clients see it: with the stock client, beside a plain server, when things end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.cluster.conftest import MODEL, Cluster, Load, left_behind, running, wait_for
from tests.e2e.conftest import Server

pytestmark = pytest.mark.timeout(600)
_DELTA = re.compile(r'"content": ?"|"delta": ?"|"text": ?"')
UNTOLD = re.compile(r'"(?:id|created|created_at|completed_at|item_id|response_id)": ?("[^"]*"|[\d.]+)|[0-9a-f]{32}')
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
SAME: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {"model": MODEL, "prompt": ["Hello", "Good morning"], "max_tokens": 5, "seed": 1}),
    ("POST", "/v1/messages", {**CHAT, "stream": True}),
    ("POST", "/v1/responses", {"model": MODEL, "input": "Hello", "temperature": 0, "stream": True}),
    ("POST", "/generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}),
    ("POST", "/tokenize", {"prompt": "Hello  world"}),
    ("GET", "/v1/models/minisgl-demo", None),
    ("GET", "/health", None),
    ("GET", "/version", None),
    ("POST", "/v1/chat/completions", {**CHAT, "messages": []}),  # and what is refused
    ("POST", "/v1/chat/completions", {**CHAT, "model": "other"}),
    ("POST", "/v1/messages", {**CHAT, "max_tokens": -1}),
    ("POST", "/v1/completions", {"model": MODEL, "prompt": "x " * 4000}),
    ("POST", "/v1/completions", "no JSON"),
    ("GET", "/nowhere", None),
    ("DELETE", "/v1/models", None),
]


async def test_stock_client_streams(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        text = await _streamed(client)
    assert "minisgl" in text


async def _streamed(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Who are you?"}], stream=True, temperature=0
    )
    return "".join([event.choices[0].delta.content or "" async for event in stream])


def test_answers_are_those_of_a_plain_server(cluster: Cluster, tmp_path: Path) -> None:
    with Server.running(["-m", "minisgl", "--port", "0", "--cpu-threads", "1"], tmp_path / "log") as server:
        for method, path, body in SAME:
            answers = [_answer(url, method, path, body) for url in (server.url, cluster.url)]
            assert answers[0] == answers[1], f"{method} {path} {body}"


def _answer(url: str, method: str, path: str, body: Any) -> tuple[int, dict[str, str], str]:
    data = body if isinstance(body, str) else None if body is None else json.dumps(body)
    headers = {"content-type": "application/json"} if data else {}
    answer = httpx.request(method, url + path, content=data, headers=headers, timeout=60)
    told = {name: UNTOLD.sub("", value) for name, value in answer.headers.items() if name != "date"}
    text = UNTOLD.sub("", answer.text)
    return answer.status_code, told, _unsplit(text) if "event-stream" in told["content-type"] else text


def _unsplit(text: str) -> str:
    """Events as they are, but for how tokens share them, which is a matter of time: the texts of events that are else
    the same are joined."""
    parts, before = list[str](), ("", "")
    for event in re.sub(r'"(sequence_number|output_tokens)": ?\d+,?', "", text).split("\n\n"):
        found = _DELTA.search(event)
        head, rest = (event[: found.end()], event[found.end() :]) if found else (event, "")
        value, _, tail = rest.partition('"')
        if found and (head, tail) == before:
            parts[-1] = parts[-1].replace("\0", value + "\0")
        else:
            parts.append(f"{head}{value}\0{tail}")
        before = head, tail
    return "\n\n".join(parts)


async def test_a_stored_response_is_found_again(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        for index in range(6):
            asked: dict[str, Any] = {"model": MODEL, "max_output_tokens": 4}
            first = await client.responses.create(input=f"I am number {index}", **asked)
            assert (await client.responses.retrieve(first.id)).id == first.id
            second = await client.responses.create(input="And?", previous_response_id=first.id, **asked)
            assert second.previous_response_id == first.id


async def test_sessions_stay_and_metrics_tell(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        before = await _prompts(client)
        for _ in range(8):
            headers = {"x-session-id": "one session"}
            (
                await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}, headers=headers)
            ).raise_for_status()
        after = await _prompts(client)
    assert sorted(after[name] - before[name] for name in after) == [0, 8]
    assert after.keys() == cluster.replicas().keys()


async def _prompts(client: httpx.AsyncClient) -> Counter[str]:
    """Requests that each replica has begun, by what its metrics say."""
    text = (await client.get("/metrics")).text
    assert text.count("# TYPE minisgl:request_prompt_tokens histogram") == 1
    found = re.findall(r'minisgl:request_prompt_tokens_count\{.*replica="(\w+)"\} ([\d.]+)', text)
    return Counter({name: int(float(value)) for name, value in found})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that is scaled, and routes at random."""
    flags = "--replicas", "1", "--max-replicas", "2", "--router", "random", "--drain-timeout", "100"
    with running(tmp_path_factory.mktemp("other") / "log", *flags) as one:
        yield one


async def test_scaled_under_load(other: Cluster) -> None:
    """1 to 2 replicas: no request fails. Back to 1: `test_renewed_under_load`."""
    other.wait_replicas(1)
    load = Load(other.url, 6, max_tokens=20, pause=1.0)
    other.command("scale", "2")
    await asyncio.to_thread(other.wait_replicas, 2, frozenset(), 300)
    load.pause, begun = 0.0, load.begun
    while load.begun < begun + 300:
        await asyncio.sleep(0.02)
    assert set(await load.stop()) == {"length"}


async def test_prefix_routing_beside_random(cluster: Cluster, other: Cluster) -> None:
    """Two clusters side by side have the same load: conversations of two turns. Neither knows the other's replicas."""
    if len(other.replicas()) != 2:
        other.command("scale", "2")
    await asyncio.to_thread(other.wait_replicas, 2)
    cluster.wait_replicas(2)
    assert not cluster.replicas().keys() & other.replicas().keys()
    cached = [await _cached_tokens(one.url) for one in (cluster, other)]
    print(f"cached tokens: {cached[0]} by prefix, {cached[1]} at random")
    assert cached[0] >= 1.5 * cached[1]
    assert len(cluster.replicas()) == len(other.replicas()) == 2


async def _cached_tokens(url: str, conversations: int = 120) -> int:
    """Of all second turns. Each begins when all first ones have ended, two at a time: what has been cached of it is
    more than what waits at one replica may be ahead of the other, however slow they are."""
    gate, client = asyncio.Semaphore(2), openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    async def turn(messages: list[Any]) -> tuple[str, int]:
        async with gate:
            answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.choices[0].message.content or "", answer.usage.prompt_tokens_details.cached_tokens or 0

    texts = [
        f"Conversation {index} {os.urandom(4).hex()}: " + "some words of it. " * 20 for index in range(conversations)
    ]
    talks: list[list[Any]] = [[{"role": "user", "content": text}] for text in texts]
    async with client:
        firsts = await asyncio.gather(*map(turn, talks))
        for talk, (text, _) in zip(talks, firsts, strict=True):
            talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        return sum([cached for _, cached in await asyncio.gather(*map(turn, talks))])


async def test_a_replica_is_killed_under_streams(cluster: Cluster) -> None:
    """Every request ends once: those that had sent something with an error, all others well. Then there are two."""
    cluster.wait_replicas(2)
    before = cluster.get("/cluster")["requests"]
    load = Load(cluster.url, 32, max_tokens=800)  # so many that replicas, which are ahead of us, are at the first ones
    while load.streaming < 24:  # also some of the replica that has at least half of them
        await asyncio.sleep(0.01)
    name, pid = await asyncio.to_thread(cluster.busiest)
    load.max_tokens = 20  # of what is asked from now on
    psutil.Process(pid).kill()
    await asyncio.sleep(1)
    ends = Counter(await load.stop())
    broken = {end for end in ends if end != "length"}
    assert broken <= {"APIError: the replica that was answering has ended; try again"}, ends
    assert 0 < sum(ends[end] for end in broken) <= 32
    cluster.wait_replicas(2, without={name})
    after = cluster.get("/cluster")["requests"]
    assert after["broken"] - before["broken"] == sum(ends[end] for end in broken)
    assert after["open"] == 0
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("what", ["Ray's worker is killed", "the server stands still"])
async def test_what_had_sent_nothing_goes_elsewhere(cluster: Cluster, what: str) -> None:
    """Answers that come whole have sent nothing before: all of them are whole, whoever gave them. A server that stands
    still, and so ends nothing by itself, is found out and ended."""
    cluster.wait_replicas(2)
    before = cluster.get("/cluster")["requests"]
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120) as client:
        body = {"prompt": "Tell", "max_tokens": 250, "ignore_eos": True}
        asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(32)]
        while (await client.get("/cluster")).json()["requests"]["open"] < 16:
            await asyncio.sleep(0.01)
        name, pid = await asyncio.to_thread(cluster.busiest)
        if what == "the server stands still":
            os.kill(pid, signal.SIGSTOP)
        else:
            psutil.Process(pid).parent().kill()
        answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 32
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {250}
    cluster.wait_replicas(2, without={name})
    assert cluster.get("/cluster")["requests"]["retried"] > before["retried"]
    wait_for(lambda: not psutil.pid_exists(pid), 60)


async def test_the_router_is_killed(cluster: Cluster) -> None:
    """Its streams break off, which clients see at once; whoever comes later waits for the next one."""
    cluster.wait_replicas(2)
    load = Load(cluster.url, 8, max_tokens=120)
    while load.begun < 50:
        await asyncio.sleep(0.02)
    cluster.actor("ray::ServeReplica:minisgl:Ingress").kill()
    async with asyncio.timeout(200):
        await asyncio.sleep(1)
        ends = Counter(await load.stop())
    assert all(end == "length" or end.startswith("APIConnectionError") or "peer closed" in end for end in ends), ends
    later = Load(cluster.url, 0)
    assert await later.once("And now?") == "length"
    await later.stop()
    cluster.wait_replicas(2)


async def test_renewed_under_load(other: Cluster) -> None:
    """To 1 replica, and that with other options: no request fails. Then the command is killed, which is the worst end:
    nothing is left behind."""
    load = Load(other.url, 6, max_tokens=400, pause=0.0)
    while load.begun < 300:  # they have something to do at any time, for longer than Ray waits before it ends one
        await asyncio.sleep(0.02)
    other.command("scale", "1")
    await asyncio.to_thread(other.wait_replicas, 1, frozenset(), 300)
    old = set(other.replicas())
    other.command("scale", "1", "--options", '{"max_running_requests": 64}')
    await asyncio.to_thread(other.wait_replicas, 1, old, 300)
    assert set(await load.stop()) == {"length"}
    assert other.get("/server_info")["max_running_requests"] == 64
    family = other.family()
    assert len(family) > 10
    other.process.kill()
    other.process.wait()
    assert not left_behind(family)


async def test_the_first_cluster_does_not_mind(cluster: Cluster) -> None:
    assert (await _cached_tokens(cluster.url, 4)) >= 0


def test_the_head_is_killed(cluster: Cluster) -> None:
    """The last test that needs this cluster: all of it ends, with a line that says why."""
    family = cluster.family()
    next(one for one in family if one.name() == "gcs_server").kill()
    assert cluster.process.wait(200) == 1
    assert re.search(r"^minisgl: error: Ray's head at \S+ is lost: no Ray answers there", cluster.text, re.M)
    assert not left_behind(family)
