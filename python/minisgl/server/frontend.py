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
from typing import Any

import msgspec

from minisgl.config.runtime import Addresses
from minisgl.core import MAX_SEED, FinishReason, SamplingParams
from minisgl.errors import MiniSGLError, RequestError, WorkerDied
from minisgl.message.backend import AbortMsg, BackendMsg, FlushMsg, PingMsg, StatsMsg, backend_codec
from minisgl.message.codec import pack_ids, unpack_ids
from minisgl.message.frontend import (
    AcceptedReply,
    DecodedReply,
    EncodedReply,
    ErrorReply,
    FlushReply,
    FrontendMsg,
    StatsReply,
    UserReply,
    frontend_codec,
)
from minisgl.message.tokenizer import (
    ChatPrompt,
    DecodeMsg,
    EncodeMsg,
    Prompt,
    TextPrompt,
    TokenizeMsg,
    TokenizerMsg,
    tokenizer_codec,
)
from minisgl.server.metrics import RequestMetrics, Timing
from minisgl.utils.sockets import AsyncPullSocket, PushSocket

logger = logging.getLogger(__name__)

Question = PingMsg | EncodeMsg | DecodeMsg | StatsMsg | FlushMsg


class Stream(AsyncIterator[UserReply]):
    """The replies to one request, up to the one with a finish reason. `aclose` before that aborts the request.

    What has come since the last look is handed out as one reply, so a slow reader costs less, not more.
    Raises: RequestError when the request is refused or fails, WorkerDied when a child process is gone.
    """

    __slots__ = ("_accepted", "_error", "_finished", "_frontend", "_replies", "_waiter", "request_ids", "timing", "uid")

    def __init__(self, frontend: Frontend, uid: int, request_ids: Sequence[str] = ()) -> None:
        self.uid = uid
        self.request_ids = request_ids  # by which clients know it
        self.timing = Timing()
        self._frontend = frontend
        self._replies: deque[UserReply] = deque()
        self._waiter: asyncio.Future[None] | None = None
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
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Idempotent."""
        self.abort()

    def abort(self) -> None:
        """The same, from where nothing can be awaited."""
        self._frontend.abort(self)

    def push(self, reply: UserReply) -> None:
        self._replies.append(reply)
        self._finished = reply.finish_reason is not None
        self._wake()

    def accept(self) -> None:
        self._accepted = True
        self._wake()

    def fail(self, error: MiniSGLError) -> None:
        self._error = error
        self._finished = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(replies: deque[UserReply]) -> UserReply:
    """All waiting replies as one: texts and ids joined, counts and end of the last."""
    text = "".join(reply.text for reply in replies)
    token_ids = b"".join(reply.token_ids for reply in replies)
    logprobs = tuple(token for reply in replies for token in reply.logprobs)
    prompt_logprobs = tuple(token for reply in replies for token in reply.prompt_logprobs)
    first, last = replies[0], replies[-1]
    replies.clear()
    return msgspec.structs.replace(
        last,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        prompt_end=first.prompt_end,
    )


class Frontend:
    """Owns the streams by uid. Lives in one asyncio loop; use as an async context manager."""

    def __init__(self, addresses: Addresses) -> None:
        self._inbox = AsyncPullSocket(addresses.frontend, frontend_codec)
        self._tokenizers: list[PushSocket[TokenizerMsg]] = [
            PushSocket(addresses.tokenizer(index), tokenizer_codec) for index in range(max(1, addresses.num_tokenizer))
        ]
        self._backend: PushSocket[BackendMsg] = PushSocket(addresses.backend, backend_codec)
        self.metrics = RequestMetrics()
        self._streams: dict[int, Stream] = {}
        self._asked: dict[int, asyncio.Future[FrontendMsg]] = {}  # what is not a stream: one answer each
        self._uids = itertools.count(1)
        self._down: MiniSGLError | None = None  # set: every new request gets this error
        self._receiver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Frontend:
        self._receiver = asyncio.get_running_loop().create_task(self._receive(), name="frontend-receive")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def num_streams(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    async def close(self) -> None:
        """End every stream with an error and close the sockets. Idempotent."""
        self.fail(WorkerDied("the server is shutting down"))
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiver
            self._receiver = None
            self._inbox.close()
            self._backend.close()
            for socket in self._tokenizers:
                socket.close(linger_ms=100)  # the last aborts

    def submit(
        self, prompt: Prompt, params: SamplingParams, request_ids: Sequence[str] = (), *, notify: bool = False
    ) -> Stream:
        """Send a request on its way. request_ids: for `cancel`; notify: for `Stream.accepted`.

        Raises: WorkerDied when the server is going down.
        """
        if self._down is not None:
            raise self._down
        if params.seed is None:
            params = replace(params, seed=random.randint(0, MAX_SEED))
        uid = next(self._uids)
        self._tokenizer_of(uid).send([TokenizeMsg(uid=uid, prompt=prompt, params=params, notify=notify)])
        stream = self._streams[uid] = Stream(self, uid, request_ids)
        return stream

    def abort(self, stream: Stream) -> None:
        """End a stream that nobody reads any more. The abort goes the way of its request, so it cannot come first."""
        if self._streams.pop(stream.uid, None) is None:
            return
        self.metrics.finish(stream.timing, FinishReason.ABORT)
        stream.fail(RequestError("the request was aborted", status=499))
        if self._down is None:
            self._tokenizer_of(stream.uid).send([AbortMsg(uid=stream.uid)])

    def cancel(self, request_id: str | None = None) -> int:
        """End the streams with this id (None: all) with `abort`, which their readers see. Returns how many they are."""
        chosen = [s for s in self._streams.values() if request_id is None or request_id in s.request_ids]
        for stream in chosen:
            self._tokenizer_of(stream.uid).send([AbortMsg(uid=stream.uid)])
        return len(chosen)

    async def ping(self, timeout: float) -> None:
        """A round trip through tokenizer, scheduler and detokenizer.

        Raises: WorkerDied when a child is gone or no answer comes within `timeout` seconds.
        """
        await self._ask(self._tokenizers[0], PingMsg(uid=next(self._uids)), timeout)

    async def encode(self, prompt: ChatPrompt | TextPrompt, *, special: bool) -> list[int]:
        """The token ids of a prompt, which is not run. Raises: RequestError when it is refused, WorkerDied."""
        uid = next(self._uids)
        reply = await self._ask(self._tokenizer_of(uid), EncodeMsg(uid, prompt, special))
        assert isinstance(reply, EncodedReply)
        return unpack_ids(reply.token_ids)

    async def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of token ids. Raises: RequestError when one of them does not exist, WorkerDied."""
        uid = next(self._uids)
        reply = await self._ask(self._tokenizer_of(uid), DecodeMsg(uid, pack_ids(token_ids), skip_special))
        assert isinstance(reply, DecodedReply)
        return reply.text

    async def stats(self, timeout: float) -> StatsReply:
        """Rank 0's counts. Raises: WorkerDied, as `ping`."""
        reply = await self._ask(self._backend, StatsMsg(uid=next(self._uids)), timeout)
        assert isinstance(reply, StatsReply)
        return reply

    async def flush_cache(self, timeout: float) -> int:
        """Forget the cached prefixes that nobody uses. Returns the number of pages freed. Raises: WorkerDied."""
        reply = await self._ask(self._backend, FlushMsg(uid=next(self._uids)), timeout)
        assert isinstance(reply, FlushReply)
        return reply.num_pages

    async def _ask(self, socket: PushSocket[Any], message: Question, timeout: float | None = None) -> FrontendMsg:
        if self._down is not None:
            raise self._down
        answer = self._asked[message.uid] = asyncio.get_running_loop().create_future()
        socket.send([message])
        try:
            return await asyncio.wait_for(answer, timeout)
        except asyncio.TimeoutError:
            raise WorkerDied(f"the scheduler did not answer in {timeout:g} s") from None
        finally:
            del self._asked[message.uid]

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

    def _tokenizer_of(self, uid: int) -> PushSocket[TokenizerMsg]:
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
        if not isinstance(message, (UserReply, AcceptedReply, ErrorReply)) or message.uid in self._asked:
            self._take_answer(message)
            return
        stream = self._streams.get(message.uid)
        if stream is None:
            return  # aborted here; the reply was under way
        if isinstance(message, AcceptedReply):
            stream.accept()
            return
        if isinstance(message, ErrorReply):
            del self._streams[message.uid]
            self.metrics.finish(stream.timing, FinishReason.ERROR)
            stream.fail(_request_error(message))
            return
        self.metrics.take(stream.timing, message)
        if message.finish_reason is not None:
            del self._streams[message.uid]
        if message.finish_reason is FinishReason.ERROR:
            stream.fail(RequestError(message.error or "the request failed", status=500))
        else:
            stream.push(message)

    def _take_answer(self, message: FrontendMsg) -> None:
        answer = self._asked.get(message.uid)
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if isinstance(message, ErrorReply):
            answer.set_exception(_request_error(message))
        else:
            answer.set_result(message)


def _request_error(reply: ErrorReply) -> RequestError:
    return RequestError(reply.message, param=reply.param, code=reply.code, status=reply.status)
