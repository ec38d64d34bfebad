"""What nobody of ours would send: bytes that are no message are dropped, messages that make no sense harm nobody."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from minisgl.config.runtime import SchedulerConfig, TokenizerConfig
from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import EngineError, RequestError
from minisgl.message.messages import (
    AbortMsg,
    ChatPrompt,
    DecodeMsg,
    DetokenizeMsg,
    EncodeMsg,
    ErrorReply,
    FlushMsg,
    IdsPrompt,
    PingMsg,
    RankBatch,
    StreamStart,
    TextPrompt,
    TokenizeMsg,
    UserMsg,
    UserReply,
    backend_codec,
    frontend_codec,
    pack_ids,
    rank_codec,
    tokenizer_codec,
)
from minisgl.message.sockets import MAX_FRAME_BYTES, PullSocket, PushSocket, ipc_endpoints
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LeaderTransport, LocalTransport
from minisgl.tokenizer.server import TokenizerServer
from tests.simulator import SimulatedEngine
from tests.tokenizers_fixture import make_byte_level

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIG = SchedulerConfig(4, 16, 64, 64, 4, vocab_size=50, check_integrity=1, integrity_fatal=True)

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
GOOD: dict[str, tuple[Any, Any]] = {  # a channel's codec, and a message that shows that it lives
    "backend": (backend_codec, UserMsg(7, pack_ids([1, 2, 3]), GREEDY)),
    "tokenizer": (tokenizer_codec, TokenizeMsg(7, TextPrompt("hello"), GREEDY)),
    "detokenizer": (tokenizer_codec, DetokenizeMsg(7, pack_ids([5]), finish_reason=FinishReason.STOP)),
    "frontend": (frontend_codec, UserReply(7, "text", b"", 1, 1, 0, FinishReason.STOP)),
    "rank": (rank_codec, RankBatch(0, [AbortMsg(7)])),
}

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def frames(draw: st.DrawFn, good: bytes) -> bytes:
    """Anything: noise, msgpack of something else, or a good frame that was cut, changed or repeated."""
    kind = draw(st.sampled_from(["noise", "msgpack", "cut", "changed", "repeated"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "msgpack":
        return msgspec.msgpack.encode(draw(values))
    if kind == "cut":
        return good[: draw(st.integers(0, len(good) - 1))]
    if kind == "repeated":
        return good * draw(st.integers(2, 3))
    index = draw(st.integers(0, len(good) - 1))
    return good[:index] + draw(st.binary(min_size=1, max_size=4)) + good[index + draw(st.integers(0, 4)) :]


class Raw:
    """A codec for frames as they are."""

    def encode(self, messages: Sequence[bytes]) -> bytes:
        return messages[0]

    def decode(self, data: bytes) -> list[bytes]:
        return [data]


class Channel:
    """A PULL socket, and one that pushes raw frames."""

    def __init__(self, folder: str, name: str) -> None:
        codec, self.good = GOOD[name]
        self.pull: PullSocket[Any] = PullSocket(f"ipc://{folder}/{name}", codec)
        self.push: PushSocket[bytes] = PushSocket(f"ipc://{folder}/{name}", Raw())
        self.frame: bytes = codec.encode([self.good])

    def deliver(self, frame: bytes) -> list[Any]:
        self.push.send([frame])
        return self.pull.receive(10)


@pytest.fixture(scope="module")
def channels() -> Iterator[dict[str, Channel]]:
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        made = {name: Channel(folder, name) for name in GOOD}
        yield made
        for channel in made.values():
            channel.push.close()
            channel.pull.close()


@pytest.mark.parametrize("name", GOOD)
@SETTINGS
@given(data=st.data())
def test_whatever_bytes_come_the_channel_lives(channels: dict[str, Channel], name: str, data: st.DataObject) -> None:
    channel = channels[name]
    channel.deliver(data.draw(frames(channel.frame)))
    assert channel.deliver(channel.frame) == [channel.good]


def test_the_log_tells_of_dropped_frames_but_not_of_each(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        channel = Channel(folder, "backend")
        for _ in range(200):
            assert channel.deliver(b"\xc1 <script> a prompt") == []
        channel.push.close()
        channel.pull.close()
    assert [line.split("; ")[1] for line in caplog.messages] == [f"{2**i} so far" for i in range(8)]
    assert "19 bytes at ipc://" in caplog.messages[0]
    assert all("prompt" not in line for line in caplog.messages)


def test_between_ranks_a_frame_that_is_no_message_is_the_end() -> None:
    """A rank that has missed a turn would plan otherwise than the rest."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        pull = PullSocket(f"ipc://{folder}/rank", rank_codec, strict=True)
        push: PushSocket[bytes] = PushSocket(f"ipc://{folder}/rank", Raw())
        push.send([b"nonsense"])
        with pytest.raises(EngineError, match="are no message"):
            pull.receive(10)
        push.close()
        pull.close()


def test_frames_have_a_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert MAX_FRAME_BYTES <= 1 << 30
    monkeypatch.setattr("minisgl.message.sockets.MAX_FRAME_BYTES", 1000)
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        pull = PullSocket(f"ipc://{folder}/x", backend_codec)
        push: PushSocket[bytes] = PushSocket(f"ipc://{folder}/x", Raw())
        push.send([bytes(1001)])
        assert pull.receive(0.5) == [] and not caplog.messages, "it has come in, and was no message"
        push.send([bytes(1000)])
        assert pull.receive(10) == [] and "1000 bytes" in caplog.messages[0]
        push.close()
        pull.close()


uids = st.integers(0, 3) | st.integers(0, 2**64 - 1) | st.integers(-(2**63), -1)
ids = st.binary(max_size=80) | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=70).map(pack_ids)
tokens = st.integers(-5, 60) | st.integers(-(2**63), 2**63 - 1)
params = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.none() | st.integers(-1, 100) | st.just(2**63 - 1),
        "temperature": st.floats(),
        "top_k": st.integers(-2, 2**63 - 1),
        "seed": st.none() | st.integers(-1, 2**63 - 1),
        "stop_token_ids": st.lists(tokens, max_size=3),
        "min_tokens": st.integers(-1, 100),
        "logit_bias": st.lists(st.tuples(tokens, st.floats()), max_size=3),
        "logprobs": st.none() | st.integers(-1, 25),
        "prompt_logprobs": st.none() | st.integers(-1, 25),
        "priority": st.integers(),
        "echo": st.booleans(),
        "ignore_eos": st.booleans(),
        "stop": st.lists(st.text(max_size=3), max_size=2),
        "cache_salt": st.text(max_size=4),
    },
)


def decoded(codec: Any, kind: type[msgspec.Struct], fields: dict[str, Any]) -> list[Any]:
    """What a worker makes of a message with these fields: as it comes over the wire, or nothing if that is refused."""
    try:
        frame = msgspec.msgpack.encode([{"type": kind.__struct_config__.tag, **fields}])
        messages: list[Any] = codec.decode(frame)
        return messages
    except (msgspec.ValidationError, RequestError, OverflowError):
        return []


requests = st.fixed_dictionaries(
    {"uid": uids, "prompt": ids, "params": params}, optional={"count": st.integers(-1, 6) | st.just(2**63)}
)


@settings(max_examples=200, deadline=None)
@given(fields=st.lists(requests, min_size=1, max_size=4), aborts=st.lists(uids, max_size=3))
def test_requests_that_make_no_sense_end_or_are_ignored(fields: list[dict[str, Any]], aborts: list[int]) -> None:
    """In a scheduler whose device would notice what it cannot compute; a good request among them is answered."""
    transport = LocalTransport()
    scheduler = Scheduler(CONFIG, SimulatedEngine(CONFIG), transport)
    transport.put([UserMsg(1 << 40, pack_ids([1, 2, 3]), SamplingParams(max_tokens=4, seed=0, ignore_eos=True))])
    wanted = Counter([1 << 40])
    for one in fields:
        messages = decoded(backend_codec, UserMsg, one)
        transport.put(messages)
        wanted.update(uid for message in messages for uid in message.uids)
    transport.put([message for uid in aborts for message in decoded(backend_codec, AbortMsg, {"uid": uid})])
    ended: dict[int, int] = {}
    for _ in range(500):
        scheduler.turn()
        for message in transport.take_outputs():
            assert message.uid in wanted
            if message.finish_reason is not None:
                ended[message.uid] = ended.get(message.uid, 0) + 1
            if message.uid == 1 << 40:
                assert message.finish_reason in (None, FinishReason.LENGTH)
        if scheduler.planner.is_idle:
            break
    assert ended.keys() == wanted.keys()
    assert all(ended[uid] <= times for uid, times in wanted.items())  # a uid is free again when its request has ended
    assert scheduler.planner.pages.num_free == CONFIG.num_pages


texts = st.text(max_size=20)
starts = st.builds(
    StreamStart,
    st.integers(-(2**40), 2**40),
    st.lists(texts, max_size=2).map(tuple),
    st.binary(max_size=9),
    st.booleans(),
    st.booleans(),
    st.integers(-3, 3),
    st.booleans(),
    st.binary(max_size=9),
)
packed = st.binary(max_size=36)
prompts = (
    st.builds(IdsPrompt, ids)
    | st.builds(TextPrompt, texts)
    | st.builds(ChatPrompt, st.lists(st.dictionaries(texts, values, max_size=3), max_size=2))
)
odd = st.one_of(
    st.builds(TokenizeMsg, st.integers(0, 5), prompts, st.just(GREEDY), st.integers(0, 3), st.booleans()),
    st.builds(
        DetokenizeMsg,
        st.integers(0, 3),
        ids,
        st.integers(-1, 5),
        st.integers(-3, 3),
        st.none() | starts,
        st.none() | st.sampled_from(FinishReason),
        st.none() | texts,
        st.integers(-1, 999),
        packed,
        packed,
    ),
    st.builds(DecodeMsg, uids, ids, st.booleans()),
    st.builds(EncodeMsg, uids, st.builds(TextPrompt, texts), st.booleans()),
    st.builds(AbortMsg, uids),
    st.builds(PingMsg, uids, st.booleans()),
    st.builds(FlushMsg, uids),
    st.builds(ErrorReply, uids, texts),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenizerServer]:
    """A process's worth of both directions."""
    path = make_byte_level(tmp_path_factory.mktemp("fuzz") / "model")
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        endpoints = ipc_endpoints(folder)
        made = TokenizerServer(TokenizerConfig(str(path), 64, 400), endpoints, endpoints.detokenizer)
        yield made
        made.close()


@SETTINGS
@given(messages=st.lists(odd, max_size=5))
def test_tokenizer_and_detokenizer_go_on(server: TokenizerServer, messages: list[Any]) -> None:
    to_backend, to_frontend = server.handle(messages)
    backend_codec.encode(to_backend)
    frontend_codec.encode(to_frontend)
    server.handle([FlushMsg(0)])
    to_backend, _ = server.handle([TokenizeMsg(7, TextPrompt("hello"), GREEDY)])
    assert [message.uid for message in to_backend if isinstance(message, UserMsg)] == [7]


class Poor:
    def encode(self, messages: Any) -> bytes:
        if any(message.uid == 2 and message.token_ids for message in messages):
            raise MemoryError
        return tokenizer_codec.encode(messages)


def test_an_output_for_which_there_is_no_memory_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of the step are told all the same."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        endpoints = ipc_endpoints(folder)
        inbox = PullSocket(endpoints.detokenizer, tokenizer_codec)
        monkeypatch.setattr("minisgl.scheduler.transport.wire.tokenizer_codec", Poor())
        transport = LeaderTransport(endpoints, lambda: None)
        inbox.receive(10)
        transport.send([DetokenizeMsg(uid, pack_ids([uid])) for uid in (1, 2, 3)])
        received: list[Any] = []
        while len(received) < 3:
            received += inbox.receive(10)
        assert [(message.uid, message.finish_reason) for message in received] == [
            (1, None),
            (2, FinishReason.ERROR),
            (3, None),
        ]
        assert transport.receive(block=False) == [AbortMsg(2)]
        inbox.close()
        transport.close()


def test_good_messages_are_as_they_were() -> None:
    for codec, message in GOOD.values():
        assert codec.decode(codec.encode([message])) == [message]
    for count in (-1, 5000):
        with pytest.raises(msgspec.ValidationError, match="count"):
            backend_codec.decode(backend_codec.encode([UserMsg(1, b"", SamplingParams(), count)]))
    for uid in (-1, 2**62):
        with pytest.raises(msgspec.ValidationError, match="uid"):
            backend_codec.decode(backend_codec.encode([AbortMsg(uid)]))
