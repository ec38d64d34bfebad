"""The API server's side of the message channels: every request in flight is a stream with a uid."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from minisgl.config.runtime import Addresses
from minisgl.core import MAX_SEED, FinishReason, SamplingParams
from minisgl.errors import MiniSGLError, RequestError, WorkerDied
from minisgl.message import frontend as replies
from minisgl.message import tokenizer
from minisgl.message.backend import AbortMsg, BackendMsg, FlushMsg, PingMsg, StatsMsg, backend_codec
from minisgl.message.codec import pack_ids, unpack_ids
from minisgl.message.frontend import FrontendMsg, UserReply
from minisgl.server.metrics import RequestMetrics, Timing
from minisgl.utils.sockets import AsyncPullSocket, PushSocket

logger = logging.getLogger(__name__)

A = TypeVar("A")


class Stream(AsyncIterator[UserReply]):
    """The replies to one request, up to the one with a finish reason. `aclose` before that aborts the request.

    What has come since the last look is handed out as one reply, so a slow reader costs less, not more.
    Raises: RequestError when the request is refused or fails, WorkerDied when a child process is gone.
    """

    __slots__ = (
        "_accepted",
        "_error",
        "_finished",
        "_frontend",
        "_news",
        "_replies",
        "first_uid",
        "request_ids",
        "timing",
        "uid",
    )

    def __init__(self, frontend: Frontend, uid: int, first_uid: int, request_ids: Sequence[str] = ()) -> None:
        self.uid, self.first_uid = uid, first_uid  # of all outputs of its request
        self.request_ids = request_ids  # by which clients know it
        self.timing = Timing()
        self._frontend = frontend
        self._replies: deque[UserReply] = deque()
        self._news = asyncio.Event()
        self._error: MiniSGLError | None = None
        self._accepted = False  # the tokenizer has no objection
        self._finished = False  # nothing more is to come

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> UserReply:
        while not self._replies:
            if self._error is not None:
                raise self._error
            if self._finished:
                raise StopAsyncIteration
            await self._change()
        replies = self._replies
        return replies.popleft() if len(replies) == 1 else _merge(replies)

    async def accepted(self) -> None:
        """Wait until the request, if it asked for a notice, has passed the tokenizer, or until its first reply.

        Raises: RequestError when it is refused, WorkerDied.
        """
        while not (self._accepted or self._replies):
            if self._error is not None:
                raise self._error
            await self._change()

    async def _change(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Idempotent."""
        self.abort()

    def abort(self) -> None:
        """The same, from where nothing can be awaited."""
        self._frontend.abort(self)

    def push(self, reply: UserReply) -> None:
        self._replies.append(reply)
        self._finished = reply.finish_reason is not None
        self._news.set()

    def accept(self) -> None:
        self._accepted = True
        self._news.set()

    def fail(self, error: MiniSGLError) -> None:
        self._error = error
        self._news.set()


def _merge(replies: deque[UserReply]) -> UserReply:
    """All waiting replies as one: texts and ids joined, counts and end of the last."""
    merged = msgspec.structs.replace(
        replies[-1],
        text="".join(reply.text for reply in replies),
        token_ids=b"".join(reply.token_ids for reply in replies),
        logprobs=tuple(token for reply in replies for token in reply.logprobs),
        prompt_logprobs=tuple(token for reply in replies for token in reply.prompt_logprobs),
        prompt_end=replies[0].prompt_end,
    )
    replies.clear()
    return merged


class Frontend:
    """Owns the streams by uid. Lives in one asyncio loop; use as an async context manager."""

    def __init__(self, addresses: Addresses) -> None:
        self._inbox = AsyncPullSocket(addresses.frontend, replies.frontend_codec)
        self._tokenizers: list[PushSocket[tokenizer.TokenizerMsg]] = [
            PushSocket(addresses.tokenizer(index), tokenizer.tokenizer_codec)
            for index in range(max(1, addresses.num_tokenizer))
        ]
        self._backend: PushSocket[BackendMsg] = PushSocket(addresses.backend, backend_codec)
        self.metrics = RequestMetrics()
        self._streams: dict[int, Stream] = {}
        self._asked: dict[int, asyncio.Future[FrontendMsg]] = {}  # what is not a stream: one answer each
        self._uids = itertools.count(1)
        self._down: MiniSGLError | None = None  # set: every new request gets this error
        self._receiver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Frontend:
        self._receiver = asyncio.create_task(self._receive(), name="frontend-receive")
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every stream with an error and close the sockets."""
        self.fail(WorkerDied("the server is shutting down"))
        assert self._receiver is not None
        self._receiver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiver
        self._inbox.close()
        self._backend.close()
        for socket in self._tokenizers:
            socket.close(linger_ms=100)  # the last aborts

    @property
    def num_streams(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    def submit(
        self,
        prompt: tokenizer.Prompt,
        params: SamplingParams,
        request_ids: Sequence[str] = (),
        *,
        notify: bool = False,
        count: int = 1,
    ) -> list[Stream]:
        """Send a request for `count` outputs on its way, each a stream. request_ids: for `cancel`; notify: for
        `Stream.accepted`.

        Raises: WorkerDied when the server is going down.
        """
        if self._down is not None:
            raise self._down
        if params.seed is None:
            params = replace(params, seed=random.randint(0, MAX_SEED))
        uids = [next(self._uids) for _ in range(count)]
        self._tokenizer_of(uids[0]).send([tokenizer.TokenizeMsg(uids[0], prompt, params, notify, count)])
        streams = [Stream(self, uid, uids[0], request_ids) for uid in uids]
        self._streams |= {stream.uid: stream for stream in streams}
        return streams

    def abort(self, stream: Stream) -> None:
        """End a stream that nobody reads any more. The abort goes the way of its request, so it cannot come first."""
        if self._streams.pop(stream.uid, None) is None:
            return
        self.metrics.finish(stream.timing, FinishReason.ABORT)
        stream.fail(RequestError("the request was aborted", status=499))
        if self._down is None:
            self._tokenizer_of(stream.first_uid).send([AbortMsg(uid=stream.uid)])

    def cancel(self, request_id: str | None = None) -> int:
        """End the streams with this id (None: all) with `abort`, which their readers see. Returns how many they are."""
        chosen = [s for s in self._streams.values() if request_id is None or request_id in s.request_ids]
        for stream in chosen:
            self._tokenizer_of(stream.first_uid).send([AbortMsg(uid=stream.uid)])
        return len(chosen)

    async def ping(self, timeout: float) -> None:
        """A round trip through all children. Raises: WorkerDied when one is gone, or after so many seconds."""
        await self._ask(self._tokenizers[0], PingMsg(next(self._uids)), replies.PongReply, timeout)

    async def encode(self, prompt: tokenizer.ChatPrompt | tokenizer.TextPrompt, *, special: bool) -> list[int]:
        """The token ids of a prompt, which is not run. Raises: RequestError when it is refused, WorkerDied."""
        uid = next(self._uids)
        question = tokenizer.EncodeMsg(uid, prompt, special)
        return unpack_ids((await self._ask(self._tokenizer_of(uid), question, replies.EncodedReply)).token_ids)

    async def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of token ids. Raises: RequestError when one of them does not exist, WorkerDied."""
        uid = next(self._uids)
        question = tokenizer.DecodeMsg(uid, pack_ids(token_ids), skip_special)
        return (await self._ask(self._tokenizer_of(uid), question, replies.DecodedReply)).text

    async def stats(self, timeout: float) -> replies.StatsReply:
        """Rank 0's counts. Raises: WorkerDied, as `ping`."""
        return await self._ask(self._backend, StatsMsg(next(self._uids)), replies.StatsReply, timeout)

    async def flush_cache(self, timeout: float) -> int:
        """Forget the cached prefixes that nobody uses. Returns the number of pages freed. Raises: WorkerDied."""
        return (await self._ask(self._backend, FlushMsg(next(self._uids)), replies.FlushReply, timeout)).num_pages

    async def _ask(self, socket: PushSocket[Any], question: Any, kind: type[A], timeout: float | None = None) -> A:
        """question: a message, with the uid that its answer has. kind: of the answer."""
        if self._down is not None:
            raise self._down
        answer = self._asked[question.uid] = asyncio.get_running_loop().create_future()
        socket.send([question])
        try:
            reply = await asyncio.wait_for(answer, timeout)
            assert isinstance(reply, kind)
            return reply
        except asyncio.TimeoutError:
            raise WorkerDied(f"the scheduler did not answer in {timeout:g} s") from None
        finally:
            del self._asked[question.uid]

    def refuse(self, error: MiniSGLError) -> None:
        """From now on every new request gets this error; those in flight go on."""
        if self._down is None:
            self._down = error

    def fail(self, error: MiniSGLError) -> None:
        """End every stream and ping with this error, and refuse new ones."""
        self.refuse(error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)

    def _tokenizer_of(self, uid: int) -> PushSocket[tokenizer.TokenizerMsg]:
        return self._tokenizers[uid % len(self._tokenizers)]

    async def _receive(self) -> None:
        try:
            while True:
                for message in await self._inbox.receive():
                    self._dispatch(message)
        except Exception:
            logger.exception("replies cannot be received any more")
            self.fail(WorkerDied("the API server cannot receive replies any more"))

    def _dispatch(self, message: FrontendMsg) -> None:
        stream, answer, error = self._streams.get(message.uid), self._asked.get(message.uid), None
        if isinstance(message, replies.ErrorReply):
            error = RequestError(message.message, param=message.param, code=message.code, status=message.status)
        if answer is not None and not answer.done():
            if error is None:
                answer.set_result(message)
            else:
                answer.set_exception(error)
        if stream is None:
            return  # not a stream's, or one that was aborted here while the reply was under way
        if error is not None:
            del self._streams[message.uid]
            self.metrics.finish(stream.timing, FinishReason.ERROR)
            stream.fail(error)
        elif isinstance(message, UserReply):
            self.metrics.take(stream.timing, message)
            if message.finish_reason is not None:
                del self._streams[message.uid]
            if message.finish_reason is FinishReason.ERROR:
                stream.fail(RequestError(message.error or "the request failed", status=message.error_status))
            else:
                stream.push(message)
        elif isinstance(message, replies.AcceptedReply):
            stream.accept()
