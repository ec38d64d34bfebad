"""What takes long to read: other threads, in the right order, within limits of time and size."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from minisgl.config.runtime import TokenizerConfig
from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.messages import (
    AbortMsg,
    AcceptedReply,
    BackendMsg,
    ChatPrompt,
    DecodedReply,
    DecodeMsg,
    DetokenizeMsg,
    EncodedReply,
    EncodeMsg,
    ErrorReply,
    FrontendMsg,
    TextPrompt,
    TokenizeMsg,
    UserMsg,
    UserReply,
    backend_codec,
    frontend_codec,
    pack_ids,
    unpack_ids,
)
from minisgl.message.sockets import PullSocket, ipc_endpoints
from minisgl.server.bodies.chat import parse_chat
from minisgl.tokenizer import server as module
from minisgl.tokenizer.server import TokenizerServer
from minisgl.tokenizer.tokenize import HFTextCodec, Tokenizer
from tests.tokenizers_fixture import CHATML, make_byte_level
from tests.waiting import poll

CONFIG = TokenizerConfig(model_path="", max_seq_len=100_000, vocab_size=400)
LONG = TextPrompt("hello world " * 5000)
BUSY = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"  # hours
SLOW = "{% for m in messages %}{% if 'slow' in m.content %}" + BUSY + "{% endif %}{{ m.content }}{% endfor %}"


def request(prompt: Any, uid: int, count: int = 1, **params: Any) -> TokenizeMsg:
    return TokenizeMsg(uid, prompt, SamplingParams(**params), notify=True, count=count)


def chat(text: str, **kwargs: Any) -> ChatPrompt:
    return ChatPrompt([{"role": "user", "content": text}], template_kwargs=kwargs)


class Running:
    """A tokenizer with the ends of its sockets, and a template that is slow on demand."""

    def __init__(self, directory: Path, template: str = SLOW) -> None:
        self.codec = HFTextCodec(str(make_byte_level(directory / "model", template=template)))
        endpoints = ipc_endpoints(str(directory))
        self._backend: PullSocket[BackendMsg] = PullSocket(endpoints.backend, backend_codec)
        self._frontend: PullSocket[FrontendMsg] = PullSocket(endpoints.frontend, frontend_codec)
        self.server = TokenizerServer(CONFIG, endpoints, endpoints.detokenizer, self.codec)
        self.handle = self.server.handle

    def to_backend(self, num: int) -> list[BackendMsg]:
        return self._wait(self._backend, num)

    def to_frontend(self, num: int) -> list[FrontendMsg]:
        return self._wait(self._frontend, num)

    @staticmethod
    def _wait(socket: PullSocket[Any], num: int) -> list[Any]:
        messages: list[Any] = []
        end = time.monotonic() + 60
        while len(messages) < num and time.monotonic() < end:
            messages += socket.receive(0.1)
        return messages + socket.receive(0.05)

    def is_reading(self) -> bool:
        """Whether a thread has taken something long: its time runs."""
        return any(isinstance(thread, threading.Timer) for thread in threading.enumerate())

    def close(self) -> None:
        self.server.close()
        self._backend.close()
        self._frontend.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Paths of sockets have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="t") as directory:
        yield Path(directory)


@pytest.fixture
def running(short_path: Path) -> Iterator[Running]:
    with closing(Running(short_path)) as made:
        yield made


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)


def test_what_is_long_is_answered_later_and_the_same(running: Running) -> None:
    """Whoever comes after it is not kept waiting."""
    ids = running.codec.encode(LONG.text, special=True)
    text = running.codec.decode(ids)
    asked = [request(LONG, 1, 2), EncodeMsg(5, LONG), DecodeMsg(6, pack_ids(ids)), request(TextPrompt("x"), 7)]
    to_backend, to_frontend = running.handle(asked)
    assert [message.uid for message in (*to_backend, *to_frontend)] == [7, 7]
    replies = {message.uid: message for message in running.to_frontend(4)}
    assert replies.keys() == {1, 2, 5, 6}
    assert isinstance(replies[1], AcceptedReply) and isinstance(replies[2], AcceptedReply)
    assert isinstance(encoded := replies[5], EncodedReply) and unpack_ids(encoded.token_ids) == ids
    assert isinstance(decoded := replies[6], DecodedReply) and decoded.text == text
    (user,) = running.to_backend(1)
    assert isinstance(user, UserMsg) and (user.uid, user.count) == (1, 2)
    assert unpack_ids(user.prompt) == ids


def test_many_short_prompts_are_as_much_as_a_long_one(running: Running) -> None:
    """One request may bring a thousand: whoever comes after them is not kept waiting either."""
    text = "hello world " * 400
    asked = [request(TextPrompt(text), uid) for uid in range(60)]
    to_backend, _ = running.handle([*asked, request(TextPrompt("x"), 90)])
    at_once = [message.uid for message in to_backend]
    assert 1 <= len(at_once) <= module.SHORT // len(text) + 1
    later = [message.uid for message in running.to_backend(61 - len(at_once))]
    assert sorted(at_once + later) == [*range(60), 90]


def test_an_abort_stays_behind_its_long_request(running: Running) -> None:
    for uid in range(1, 41, 2):
        assert running.handle([request(LONG, uid, 2), AbortMsg(uid + 1)])[0] == []
    assert running.handle([AbortMsg(99)])[0] == [AbortMsg(99)]
    sent = running.to_backend(40)
    for uid in range(1, 41, 2):
        of_it = [message for message in sent if message.uid in (uid, uid + 1)]
        assert [(type(message), message.uid) for message in of_it] == [(UserMsg, uid), (AbortMsg, uid + 1)]
    assert running.handle([AbortMsg(1)])[0] == [AbortMsg(1)]  # nothing of them is left


def test_a_template_that_takes_too_long_is_interrupted(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, and the threads go on."""
    monkeypatch.setattr(module, "SECONDS", 0.3)
    for first in range(0, 3 * module.NUM_THREADS, module.NUM_THREADS):
        running.handle([request(chat("slow" * 5000), uid) for uid in range(first, first + module.NUM_THREADS)])
        replies = running.to_frontend(module.NUM_THREADS)
        assert [type(reply) for reply in replies] == [ErrorReply] * module.NUM_THREADS
        assert all("takes longer than 0.3 s to read" in str(reply) for reply in replies)
    monkeypatch.setattr(module, "SECONDS", 60.0)
    running.handle([request(chat("fast " * 5000), 90)])
    assert [message.uid for message in running.to_backend(1)] == [90]


def test_a_thread_that_cannot_be_started_costs_one_request(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("threading.Timer.start", Mock(side_effect=RuntimeError("can't start new thread")))
        running.handle([request(LONG, uid) for uid in range(2 * module.NUM_THREADS)])
        replies = running.to_frontend(2 * module.NUM_THREADS)
    assert all(isinstance(reply, ErrorReply) and reply.status == 503 for reply in replies)
    running.handle([request(LONG, 90)])
    assert [message.uid for message in running.to_backend(1)] == [90]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_THREADS", 1)


@pytest.mark.usefixtures("one_thread")
def test_the_shortest_is_next_and_nobody_works_for_those_who_left(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread, so that the order in which they are taken is that in which they are answered."""
    monkeypatch.setattr(module, "SECONDS", 2.0)
    running.handle([request(chat("slow" * 5000), 0)])
    poll(running.is_reading, "nobody reads it")
    monkeypatch.setattr(module, "SECONDS", 60.0)  # for those that follow
    sizes = {10: 9000, 11: 8000, 12: 7000, 13: 6000}
    running.handle([request(TextPrompt("hello " * size), uid) for uid, size in sizes.items()])
    running.handle([request(chat("slow" * 6000), 50), AbortMsg(50)])
    sent = running.to_backend(5)  # the abort, too
    assert [message.uid for message in sent if isinstance(message, UserMsg)] == [13, 12, 11, 10]
    gone = [message for message in running.to_frontend(6) if isinstance(message, UserReply)]
    assert [(reply.uid, reply.finish_reason) for reply in gone] == [(50, FinishReason.ABORT)]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("number", [10**9, 5000, [5000], {"a": 5000}])
def test_numbers_that_a_template_counts_to(short_path: Path, number: Any) -> None:
    """However short the prompt is: the tokenizer goes on, and the request ends."""
    counting = (
        "{% for a in range(n) %}{% for b in range(n) %}{% for c in range(n) %}{% endfor %}{% endfor %}{% endfor %}"
    )
    with closing(Running(short_path, counting + "x")) as running:
        running.handle([request(chat("x", n=number), 1)])
        (reply,) = running.to_frontend(1)
    assert isinstance(reply, ErrorReply) and reply.status == 400


@pytest.mark.parametrize("size", [10, 20_000])
def test_memory_that_is_not_there_costs_one_request(
    running: Running, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", encode := Mock(side_effect=[MemoryError(), [40]]))
    answers = [running.handle([request(TextPrompt("a" * size), uid)]) for uid in (1, 2)]
    replies = [reply for _, to_frontend in answers for reply in to_frontend] or running.to_frontend(2)
    assert encode.call_count == 2
    failed = [reply for reply in replies if isinstance(reply, ErrorReply)]
    assert [(reply.status, reply.message) for reply in failed] == [(500, "tokenization failed: MemoryError")]


def test_output_goes_on_while_a_prompt_is_read(running: Running) -> None:
    """The same process turns tokens into text."""
    running.handle([request(chat("slow" * 5000), 1)])
    poll(running.is_reading, "nobody reads it")
    for _ in range(100):
        running.handle([DetokenizeMsg(uid=2, token_ids=pack_ids([40]))])
    assert running.is_reading(), "they have waited for its end"


def tokenize(template: str, prompt: ChatPrompt, directory: Path, max_seq_len: int = 100) -> Any:
    codec = HFTextCodec(str(make_byte_level(directory / "model", template=template)))
    return Tokenizer(TokenizerConfig("", max_seq_len, 400), codec).answer(request(prompt, 1))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ messages }}{% endfor %}",
        "{% macro all() %}{% for m in messages %}{{ m.content }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ all() }}{% endfor %}",
        "{% for m in messages %}{{ tools | tojson }}{% endfor %}",
    ],
)
def test_a_template_that_repeats_everything_stops_at_what_fits(tmp_path: Path, template: str) -> None:
    """It would make gigabytes of a megabyte."""
    messages = [{"role": "user", "content": "x" * 200}] * 5000
    reply = tokenize(template, ChatPrompt(messages, [{"a": "x" * 10**6}]), tmp_path, 5000)
    assert isinstance(reply, ErrorReply)
    assert reply.code == "context_length_exceeded"


def test_more_messages_than_tokens_are_refused_before_the_template_sees_them(tmp_path: Path) -> None:
    reply = tokenize(BUSY, ChatPrompt([{"role": "user", "content": "x"}] * 300_000), tmp_path)
    assert isinstance(reply, ErrorReply)
    assert "your messages resulted in at least 300000 tokens" in reply.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ('%s' | format).__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_templates_run_in_a_sandbox(tmp_path: Path, template: str) -> None:
    """Nothing of Python is reached, or it shows as nothing."""
    reply = tokenize(template, chat("x"), tmp_path)
    assert isinstance(reply, ErrorReply), reply
    assert reply.status == 400
    assert "\n" not in reply.message and len(reply.message) < 500


def test_objects_within_objects_are_no_more_than_a_refusal(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = {"a": deep}
    reply = tokenize(CHATML, ChatPrompt([{"role": "user", "content": "x"}], [deep]), tmp_path)
    assert isinstance(reply, ErrorReply) and reply.status == 400


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "tokenizer_kwargs"])
def test_no_template_comes_with_a_request(name: str) -> None:
    for more in ({"chat_template_kwargs": {name: "{{ 1 }}"}}, {"chat_template": "{{ 1 }}"}):
        with pytest.raises(RequestError, match="chat_template"):
            parse_chat(json.dumps({"messages": [{"role": "user", "content": "x"}], **more}).encode(), {})


@pytest.mark.parametrize("text", ["a" * 30_000, "<|im_end|>" * 3000, "🙂" * 10_000, " " * 30_000])
def test_a_text_that_fits_by_its_length_is_counted_in_parts(byte_level: HFTextCodec, text: str) -> None:
    """As soon as it cannot fit any more, nothing further is encoded."""
    tokenizer = Tokenizer(TokenizerConfig("", 1000, 400), byte_level)
    byte_level.max_chars = 10**6
    with pytest.raises(RequestError, match=r"resulted in (at least )?\d+ tokens"):
        answer = tokenizer.answer(request(TextPrompt(text), 1))
        assert isinstance(answer, ErrorReply)
        raise RequestError(answer.message)
