"""The API server's side of the channels, against a stand-in for everything behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import RequestError, WorkerDied
from minisgl.message.messages import (
    AbortMsg,
    AcceptedReply,
    ErrorReply,
    FrontendMsg,
    PingMsg,
    TextPrompt,
    TokenizeMsg,
    TokenizerMsg,
    UserReply,
    backend_codec,
    frontend_codec,
    tokenizer_codec,
)
from minisgl.message.sockets import AsyncPullSocket, Endpoints, PushSocket, ipc_endpoints
from minisgl.server.frontend import Frontend, Stream

PROMPT, PARAMS = TextPrompt(text="x"), SamplingParams(max_tokens=4, seed=1)


class Peers:
    """Two tokenizers' inboxes, and a way to answer."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.inboxes = [AsyncPullSocket(endpoint, tokenizer_codec) for endpoint in endpoints.tokenizers.values()]
        self.outbox = PushSocket(endpoints.frontend, frontend_codec)

    async def receive(self, index: int) -> list[TokenizerMsg]:
        return await asyncio.wait_for(self.inboxes[index].receive(), 60)

    def reply(self, uid: int, text: str, finish: FinishReason | None = None) -> None:
        self.outbox.send([UserReply(uid, text, b"", 1, 1, 0, finish_reason=finish)])


def uid_of(stream: Stream, index: int = 0) -> int:
    return stream.outputs[index].uid


@pytest.fixture
def endpoints(tmp_path: Path) -> Endpoints:
    return ipc_endpoints(str(tmp_path), num_tokenizer=2)


@pytest.fixture
async def peers(endpoints: Endpoints) -> AsyncIterator[Peers]:
    made = Peers(endpoints)
    yield made
    for socket in (*made.inboxes, made.outbox):
        socket.close()


@pytest.fixture
async def frontend(endpoints: Endpoints) -> AsyncIterator[Frontend]:
    async with Frontend(endpoints) as made:
        yield made


async def test_replies_reach_their_stream_and_end_it(frontend: Frontend, peers: Peers) -> None:
    first, second = frontend.submit([PROMPT], PARAMS), frontend.submit([PROMPT], PARAMS)
    assert frontend.num_in_flight == 2
    peers.reply(uid_of(second), "b", FinishReason.STOP)
    peers.reply(uid_of(first), "a")
    assert [reply.text async for _, reply in second] == ["b"]
    assert (await anext(first))[1].text == "a"
    peers.reply(uid_of(first), "", FinishReason.LENGTH)
    assert [reply.finish_reason async for _, reply in first] == [FinishReason.LENGTH]
    assert frontend.num_in_flight == 0


async def test_a_slow_reader_gets_everything_at_once(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS)
    peers.outbox.send(
        [
            UserReply(uid_of(stream), "a", b"\1\0\0\0", 3, 1, 2, prompt_end="<think>"),
            UserReply(uid_of(stream), "b", b"\2\0\0\0", 3, 2, 2, finish_reason=FinishReason.STOP),
        ]
    )
    await asyncio.sleep(0.1)
    (reply,) = [reply async for _, reply in stream]
    expected = UserReply(
        uid_of(stream), "ab", b"\1\0\0\0\2\0\0\0", 3, 2, 2, finish_reason=FinishReason.STOP, prompt_end="<think>"
    )
    assert reply == expected


async def test_a_stream_is_accepted_when_the_tokenizer_says_so_or_something_comes(
    frontend: Frontend, peers: Peers
) -> None:
    streams = [frontend.submit([PROMPT], PARAMS, notify=True) for _ in range(3)]
    messages = [message for index in (0, 1, 1) for message in await peers.receive(index)]
    assert all(isinstance(message, TokenizeMsg) and message.notify for message in messages)
    waiting = [asyncio.ensure_future(stream.accepted()) for stream in streams]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    peers.outbox.send([AcceptedReply(uid_of(streams[0])), ErrorReply(uid_of(streams[1]), "too long")])
    peers.reply(uid_of(streams[2]), "a")
    await asyncio.wait_for(waiting[0], 60)
    await asyncio.wait_for(waiting[2], 60)
    with pytest.raises(RequestError, match="too long"):
        await asyncio.wait_for(waiting[1], 60)
    assert (await anext(streams[2]))[1].text == "a"  # it was no more than a look


async def test_an_abort_goes_the_way_of_its_request(frontend: Frontend, peers: Peers) -> None:
    streams = [frontend.submit([PROMPT], PARAMS) for _ in range(4)]
    for stream in streams:
        stream.abort()
        stream.abort()
    for index in range(2):
        messages = [message for _ in range(4) for message in await peers.receive(index)]
        for stream in streams:
            if uid_of(stream) % 2 == index:
                kinds = [type(message) for message in messages if message.uid == uid_of(stream)]
                assert kinds == [TokenizeMsg, AbortMsg]
    peers.reply(uid_of(streams[0]), "late")  # was under way: dropped
    await asyncio.sleep(0.05)
    with pytest.raises(RequestError):
        await anext(streams[0])


async def test_a_client_that_goes_away_in_a_drain_takes_its_request_with_it(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS)
    await peers.receive(uid_of(stream) % 2)
    frontend.refuse(WorkerDied("draining"))
    stream.abort()
    assert await peers.receive(uid_of(stream) % 2) == [AbortMsg(uid_of(stream))]


async def test_a_prompt_is_sent_once_for_all_of_its_outputs(frontend: Frontend, peers: Peers) -> None:
    frontend.submit([PROMPT], PARAMS)
    stream = frontend.submit([PROMPT], PARAMS, count=3)
    assert [output.uid for output in stream.outputs] == [2, 3, 4]
    assert await peers.receive(0) == [TokenizeMsg(2, PROMPT, PARAMS, count=3)]
    peers.reply(3, "a")
    peers.reply(2, "b", FinishReason.STOP)
    assert [(index, reply.text) for index, reply in [await anext(stream), await anext(stream)]] == [(1, "a"), (0, "b")]
    peers.outbox.send([ErrorReply(4, "no")])
    with pytest.raises(RequestError, match="no"):
        await anext(stream)
    assert frontend.num_in_flight == 2
    stream.abort()  # what is left of it
    assert frontend.num_in_flight == 1


async def test_the_outputs_of_several_prompts_end_together(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT, TextPrompt(text="y")], PARAMS, count=2)
    sent = [message for index in (1, 1) for message in await peers.receive(index)]
    assert sent == [TokenizeMsg(uid, TextPrompt(text=text), PARAMS, count=2) for uid, text in ((1, "x"), (3, "y"))]
    stream.abort()  # of which the tokenizer hears that has the request
    assert [message for _ in range(4) for message in await peers.receive(1)] == [AbortMsg(uid) for uid in (1, 2, 3, 4)]
    assert frontend.num_in_flight == 0


async def test_all_outputs_are_read_to_their_ends(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT, PROMPT], PARAMS, count=2)
    for uid in (4, 2, 1, 3):
        peers.reply(uid, "a")
        peers.reply(uid, str(uid), FinishReason.LENGTH)
    found: dict[int, str] = {}
    async for index, reply in stream:
        found[index] = found.get(index, "") + reply.text
    assert found == {0: "a1", 1: "a2", 2: "a3", 3: "a4"}
    assert frontend.num_in_flight == 0


async def test_a_finished_stream_is_not_aborted(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS)
    peers.reply(uid_of(stream), "a", FinishReason.STOP)
    assert [reply.text async for _, reply in stream] == ["a"]
    stream.abort()
    await peers.receive(uid_of(stream) % 2)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(peers.inboxes[uid_of(stream) % 2].receive(), 0.1)


async def test_refusals_and_failures_raise(frontend: Frontend, peers: Peers) -> None:
    refused, failed = frontend.submit([PROMPT], PARAMS), frontend.submit([PROMPT], PARAMS)
    peers.outbox.send([ErrorReply(uid_of(refused), "too long", 400, "prompt")])
    failure = UserReply(uid_of(failed), "", b"", 1, 1, 0, finish_reason=FinishReason.ERROR, error="NaN logits")
    peers.outbox.send([failure])
    with pytest.raises(RequestError, match="too long") as caught:
        await anext(refused)
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    with pytest.raises(RequestError, match="NaN") as caught:
        await anext(failed)
    assert caught.value.status == 500
    assert frontend.num_in_flight == 0


async def test_a_dead_worker_ends_all_and_refuses_more(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS)
    waiting = asyncio.ensure_future(anext(stream))
    ping = asyncio.ensure_future(frontend.ping(5))
    await asyncio.sleep(0)
    frontend.fail(WorkerDied("gone"))
    for task in (waiting, ping):
        with pytest.raises(WorkerDied, match="gone"):
            await task
    with pytest.raises(WorkerDied):
        frontend.submit([PROMPT], PARAMS)
    with pytest.raises(WorkerDied):
        await frontend.ping(1)


async def test_pings_come_back_or_time_out(frontend: Frontend, peers: Peers) -> None:
    ping = asyncio.ensure_future(frontend.ping(60))
    for index in range(2):
        (message,) = await peers.receive(index)
        assert isinstance(message, PingMsg)
        peers.outbox.send([PingMsg(uid=message.uid)])
    await ping
    with pytest.raises(WorkerDied, match="did not answer"):
        await frontend.ping(0.05)


async def test_seeds_are_drawn_for_those_who_give_none(frontend: Frontend, peers: Peers) -> None:
    for _ in range(4):
        frontend.submit([PROMPT], SamplingParams())
    messages = [message for _ in range(2) for message in await peers.receive(1)]
    seeds = {message.params.seed for message in messages if isinstance(message, TokenizeMsg)}
    assert len(seeds) == 2
    assert None not in seeds


DIED = WorkerDied("gone")


async def sent(peers: Peers, index: int) -> TokenizeMsg:
    """The next request that a tokenizer gets, aborts left out."""
    while True:
        for message in await peers.receive(index):
            if isinstance(message, TokenizeMsg):
                return message


async def test_what_has_not_begun_is_sent_again_when_the_schedulers_are_back(frontend: Frontend, peers: Peers) -> None:
    begun, waiting = (frontend.submit([PROMPT], PARAMS) for _ in range(2))
    peers.reply(uid_of(begun), "a")
    assert (await anext(begun))[1].text == "a"
    old = [uid_of(begun), uid_of(waiting)]
    for uid in old:
        await sent(peers, uid % 2)
    frontend.on_change("scheduler", DIED)
    with pytest.raises(WorkerDied, match="gone"):
        await anext(begun)
    later = frontend.submit([PROMPT], PARAMS)
    with pytest.raises(WorkerDied, match="gone"):
        await frontend.ping(5)
    frontend.on_change("scheduler", None)
    peers.reply(old[1], "stale", FinishReason.STOP)  # of the scheduler that has died
    for stream in (waiting, later):
        assert uid_of(stream) not in old
        assert (await sent(peers, uid_of(stream) % 2)).uid == uid_of(stream)
        peers.reply(uid_of(stream), "b", FinishReason.STOP)
        assert [reply.text async for _, reply in stream] == ["b"]
    assert frontend.num_in_flight == 0


async def test_streams_that_were_lost_are_aborted_behind_their_requests(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS)
    old = uid_of(stream)
    frontend.on_change("detokenizer-0", DIED)
    frontend.on_change("detokenizer-0", None)
    messages: list[TokenizerMsg] = []
    while len(messages) < 2:
        messages += [message for message in await peers.receive(old % 2) if message.uid == old]
    assert [type(message) for message in messages] == [TokenizeMsg, AbortMsg]


async def test_another_tokenizer_takes_over_what_the_dead_one_has_not_passed_on(
    frontend: Frontend, peers: Peers
) -> None:
    streams = [frontend.submit([PROMPT], PARAMS, notify=True) for _ in range(6)]
    mine = [stream for stream in streams if uid_of(stream) % 2 == 0]  # the first tokenizer's
    peers.reply(uid_of(mine[0]), "a")
    peers.outbox.send([AcceptedReply(uid_of(mine[1]))])
    await mine[1].accepted()
    assert (await anext(mine[0]))[1].text == "a"
    before = [uid_of(stream) for stream in streams]
    frontend.on_change("tokenizer-0", DIED)
    changed = [stream for stream, uid in zip(streams, before, strict=True) if uid_of(stream) != uid]
    assert changed == [mine[2]]
    while (await sent(peers, 1)).uid != uid_of(mine[2]):
        pass
    assert frontend.submit([PROMPT], PARAMS).outputs[0].request.route == "tokenizer-1"


async def test_a_request_whose_workers_die_each_time_ends(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS)
    for _ in range(2):
        frontend.on_change("scheduler", DIED)
        frontend.on_change("scheduler", None)
    with pytest.raises(WorkerDied, match="gone"):
        await anext(stream)


async def test_a_request_that_is_kept_can_be_cancelled(frontend: Frontend, peers: Peers) -> None:
    frontend.on_change("scheduler", DIED)
    kept, left = (frontend.submit([PROMPT], PARAMS, (name,)) for name in ("kept", "left"))
    assert frontend.find({"kept"}) == [kept]
    frontend.abort([kept])
    assert [reply.finish_reason async for _, reply in kept] == [FinishReason.ABORT]
    left.abort()
    assert frontend.num_in_flight == 0
    frontend.on_change("scheduler", None)
    for index in range(2):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(peers.inboxes[index].receive(), 0.1)


async def test_a_request_that_was_cancelled_is_not_sent_again(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS, ("id",))
    assert frontend.find({"id"}) == [stream]
    frontend.abort([stream])
    frontend.on_change("scheduler", DIED)
    with pytest.raises(WorkerDied):
        await anext(stream)


async def test_nonsense_is_dropped(frontend: Frontend, peers: Peers, endpoints: Endpoints) -> None:
    class Raw:
        def encode(self, messages: list[bytes]) -> bytes:
            return messages[0]

        def decode(self, data: bytes) -> list[bytes]:
            return [data]

    nonsense: PushSocket[bytes] = PushSocket(endpoints.frontend, Raw())
    for frame in (b"", b"\xc1", b"\x91\x81\xa4type\xa5reply", b"\x80"):
        nonsense.send([frame])
    await asyncio.sleep(0.2)
    nonsense.close()
    stream = frontend.submit([PROMPT], PARAMS)
    peers.reply(uid_of(stream), "a", FinishReason.STOP)
    assert [reply.text async for _, reply in stream] == ["a"]


async def test_where_replies_are_lost_nobody_waits_for_them(
    endpoints: Endpoints, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short:
        """Has no memory for the second frame."""

        def __init__(self) -> None:
            self.num_frames = 0

        def encode(self, messages: Sequence[FrontendMsg]) -> bytes:
            return frontend_codec.encode(messages)

        def decode(self, data: bytes) -> list[FrontendMsg]:
            self.num_frames += 1
            if self.num_frames == 2:
                raise MemoryError
            return frontend_codec.decode(data)

    monkeypatch.setattr("minisgl.message.messages.frontend_codec", Short())
    async with Frontend(endpoints) as frontend:
        begun, waiting = (frontend.submit([PROMPT], PARAMS) for _ in range(2))
        peers.reply(uid_of(begun), "a")
        assert (await anext(begun))[1].text == "a"
        peers.reply(uid_of(begun), "b")
        with pytest.raises(WorkerDied, match="replies are lost"):
            await anext(begun)
        peers.reply(uid_of(waiting), "c", FinishReason.STOP)
        assert [reply.text async for _, reply in waiting] == ["c"]


async def test_what_has_begun_is_aborted_without_its_tokenizer(
    frontend: Frontend, peers: Peers, endpoints: Endpoints
) -> None:
    backend = AsyncPullSocket(endpoints.backend, backend_codec)
    stream = frontend.submit([PROMPT], PARAMS)
    peers.reply(uid_of(stream), "a")
    assert (await anext(stream))[1].text == "a"
    frontend.on_change(f"tokenizer-{uid_of(stream) % 2}", DIED)
    stream.abort()
    assert await asyncio.wait_for(backend.receive(), 60) == [AbortMsg(uid_of(stream))]
    backend.close()


async def test_a_request_that_was_cancelled_ends_with_its_tokenizer(frontend: Frontend, peers: Peers) -> None:
    stream = frontend.submit([PROMPT], PARAMS, ("id",))
    frontend.abort(frontend.find(["id"]))
    frontend.on_change(f"tokenizer-{uid_of(stream) % 2}", DIED)
    with pytest.raises(WorkerDied):
        await anext(stream)
