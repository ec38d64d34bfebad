"""The API server's side of the message channels: every output in flight has a uid, and is part of a stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from minisgl.core import MAX_SEED, FinishReason, SamplingParams
from minisgl.errors import MiniSGLError, RequestError, WorkerDied
from minisgl.message import messages
from minisgl.message.messages import AbortMsg, FrontendMsg, PingMsg, UserReply
from minisgl.message.sockets import DETOKENIZER, AsyncPullSocket, Endpoints, PushSocket
from minisgl.server.metrics import RequestMetrics, Timing
from minisgl.trace.journal import Journal, arrived, take
from minisgl.trace.records import Output

logger = logging.getLogger(__name__)
A = TypeVar("A")
MAX_REPLIES = 32  # that wait for a slow reader one by one
MAX_SENT = 2  # times that a request is sent: one whose workers die each time may be why they do


@dataclass(slots=True, eq=False)
class _Output:
    """One output of a stream. index: among all of them."""

    request: _Request
    index: int
    uid: int = 0
    timing: Timing = field(default_factory=Timing)
    record: Output = field(default_factory=lambda: Output(0))  # the trace's


@dataclass(slots=True, eq=False)
class _Request:
    """What was sent for some outputs of a stream, and may have to be sent again."""

    stream: Stream
    message: messages.TokenizeMsg | None  # None once output has come
    outputs: list[_Output] = field(default_factory=list)  # by uid
    route: str = ""  # the tokenizer that has it; "": it waits until workers are there again
    num_sent: int = 0
    is_accepted: bool = False  # the tokenizer has no objection, or output has come


class Stream(AsyncIterator[tuple[int, UserReply]]):
    """The replies to all outputs for some prompts, each with its output's index, up to one with a finish reason for
    each. `abort` before that ends those that are left.

    What has come since the last look is handed out as one reply for each output, so a slow reader costs less, not more.
    Raises: RequestError when a request is refused or fails, WorkerDied when a child process is gone.
    """

    def __init__(self, frontend: Frontend, request_ids: Sequence[str], begin: Callable[[], None]) -> None:
        self.request_ids, self.story = request_ids, arrived(request_ids)  # how clients know it, and whose it is
        self.outputs: list[_Output] = []
        self.num_left = 0  # outputs of which more is to come
        self._frontend, self._begin = frontend, begin
        self._replies: dict[int, list[UserReply]] = {}  # by index; what has waited for the longest comes first
        self._news = asyncio.Event()
        self._error: Exception | None = None

    async def __anext__(self) -> tuple[int, UserReply]:
        while not self._replies:
            if not self.num_left:
                raise StopAsyncIteration
            await self._change()
        index = next(iter(self._replies))
        return index, _merge(self._replies.pop(index))

    async def accepted(self) -> None:
        """Wait until the requests, if they asked for a notice, have passed the tokenizer, or until their first reply.

        Raises: RequestError when one is refused, WorkerDied.
        """
        for output in self.outputs:
            while not output.request.is_accepted:
                await self._change()

    async def _change(self) -> None:
        if self._error is not None:
            raise copy(self._error)  # whose traceback would keep all that its reader has, and us
        self._news.clear()
        await self._news.wait()

    def abort(self, error: Exception | None = None) -> None:
        """End what has not ended at once: nobody reads it any more, or its reader gets this error."""
        self._frontend.abort([self], error or RequestError("the request was aborted", status=499))

    def push(self, output: _Output, reply: UserReply) -> None:
        waiting = self._replies.setdefault(output.index, [])
        waiting.append(reply)
        if output.request.message is not None:
            output.request.message, output.request.is_accepted = None, True
            self._begin()
        if len(waiting) > MAX_REPLIES:
            waiting[:] = [_merge(waiting)]
        self.num_left -= reply.finish_reason is not None
        self._news.set()

    def accept(self, output: _Output) -> None:
        output.request.is_accepted = True
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._news.set()


def _merge(replies: list[UserReply]) -> UserReply:
    """All waiting replies to one output as one: texts and ids joined, counts and end of the last."""
    if len(replies) == 1:
        return replies[0]
    return msgspec.structs.replace(
        replies[-1],
        text="".join(reply.text for reply in replies),
        token_ids=b"".join(reply.token_ids for reply in replies),
        logprobs=tuple(token for reply in replies for token in reply.logprobs),
        prompt_logprobs=tuple(token for reply in replies for token in reply.prompt_logprobs),
        prompt_end=replies[0].prompt_end,
    )


class Frontend:
    """Owns the outputs by uid. Lives in one asyncio loop; use as an async context manager."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._inbox = AsyncPullSocket(endpoints.frontend, messages.frontend_codec)
        self._tokenizers: dict[str, PushSocket[messages.TokenizerMsg]] = {
            name: PushSocket(endpoint, messages.tokenizer_codec) for name, endpoint in endpoints.tokenizers.items()
        }
        self._backend: PushSocket[messages.BackendMsg] = PushSocket(endpoints.backend, messages.backend_codec)
        self.metrics, self.journal = RequestMetrics(), Journal()
        self._outputs: dict[int, _Output] = {}  # those that have not ended
        self._lost: dict[str, WorkerDied] = {}  # groups of workers that are being started again, and why
        self._stale: list[tuple[str, int]] = []  # routes and uids of outputs that were lost with them
        self._routes = list(endpoints.tokenizers)  # tokenizers that can take a request now
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
        for socket in self._tokenizers.values():
            socket.close(linger_ms=100)  # the last aborts

    @property
    def num_in_flight(self) -> int:
        """Outputs that have not ended, and questions."""
        return len(self._outputs) + len(self._asked)

    def submit(
        self,
        prompts: Sequence[messages.Prompt],
        params: SamplingParams,
        request_ids: Sequence[str] = (),
        *,
        notify: bool = False,
        count: int = 1,
        begin: Callable[[], None] = lambda: None,
    ) -> Stream:
        """Send a request for `count` outputs of each prompt on its way; it waits while workers are started again.
        request_ids: for `find`; notify: for `Stream.accepted`; begin: called when output for a prompt comes.

        Raises: WorkerDied when the server is going down.
        """
        if self._down is not None:
            raise self._down
        stream = Stream(self, request_ids, begin)
        for prompt in prompts:
            seed = random.randint(0, MAX_SEED) if params.seed is None else params.seed
            request = _Request(stream, messages.TokenizeMsg(0, prompt, replace(params, seed=seed), count, notify))
            request.outputs = [_Output(request, stream.num_left + number) for number in range(count)]
            stream.outputs += request.outputs
            stream.num_left += count
            self._send(request)
        return stream

    def _send(self, request: _Request) -> None:
        """Under uids of which nobody has heard, so that nothing said about others can reach it."""
        assert request.message is not None
        for output in request.outputs:
            output.uid = next(self._uids)
            self._outputs[output.uid] = output
            output.record = self.journal.begin(request.stream.story, output.index, output.uid, request.message)
        first_uid = request.outputs[0].uid
        request.route = self._routes[first_uid % len(self._routes)] if self._routes else ""
        if request.route:
            request.num_sent += 1
            request.is_accepted = False
            self._tokenizers[request.route].send([msgspec.structs.replace(request.message, uid=first_uid)])

    def find(self, ids: Collection[str] | None = None, owner: str | None = None) -> list[Stream]:
        """The streams that have one of these ids (None: all), and are this owner's (None: anybody's)."""
        streams = dict.fromkeys(output.request.stream for output in self._outputs.values())
        owned = [stream for stream in streams if owner in (None, *stream.request_ids)]
        return [stream for stream in owned if ids is None or not {*stream.request_ids}.isdisjoint(ids)]

    def abort(self, streams: Sequence[Stream], error: Exception | None = None) -> int:
        """End the outputs that have not ended: at once, with an error for their readers; or without one as soon as all
        that was on its way has come, with `abort`, which their readers see. Returns how many they are."""
        outputs = [output for stream in streams for output in stream.outputs if output.uid in self._outputs]
        for output in outputs:
            request = output.request
            request.num_sent = MAX_SENT  # whatever happens, it is not sent again
            if request.route:  # what has begun needs no tokenizer; else, an abort cannot overtake what it is about
                socket: PushSocket[Any] = self._backend if request.message is None else self._tokenizers[request.route]
                socket.send([AbortMsg(output.uid)])
            if error is not None:
                self._end(output, FinishReason.ABORT, error)
            elif not request.route:
                self._dispatch(UserReply(output.uid, "", b"", 0, 0, 0, finish_reason=FinishReason.ABORT))
        return len(outputs)

    def _end(self, output: _Output, reason: FinishReason, error: Exception) -> None:
        self._outputs.pop(output.uid, None)
        self.metrics.finish(output.timing, reason)
        output.record.reason = reason.value
        output.request.stream.fail(error)

    async def ping(self, timeout: float) -> None:
        """A round trip through all children. Raises: WorkerDied when requests would wait, or after so many seconds."""
        questions = [PingMsg(next(self._uids)) for _ in self._routes or [""]]  # one for each of them
        await asyncio.gather(*(self._ask(question, PingMsg, timeout) for question in questions))

    async def ask(
        self, question: Callable[..., messages.Message], kind: type[A], timeout: float | None = None, **fields: Any
    ) -> A:
        """The answer to a question: its message, of which these are the fields, and the kind of its answer.

        Raises: RequestError when it is refused; WorkerDied, also after so many seconds.
        """
        return await self._ask(question(next(self._uids), **fields), kind, timeout)

    async def _ask(self, question: Any, kind: type[A], timeout: float | None = None) -> A:
        """question: a message, with the uid that its answer has. kind: of the answer."""
        if self._down is not None or not self._routes:
            raise self._down or next(iter(self._lost.values()))
        socket: PushSocket[Any] = self._tokenizers[self._routes[question.uid % len(self._routes)]]
        if isinstance(question, messages.BackendMsg) and not isinstance(question, PingMsg):
            socket = self._backend
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
        outputs, self._outputs = self._outputs, {}
        for output in outputs.values():
            output.request.stream.fail(error)
        self._fail_asked(error)
        self._stale.clear()

    def _fail_asked(self, error: MiniSGLError) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)

    def on_change(self, group: str, error: WorkerDied | None) -> None:
        """Workers are lost and being started again, or with None, back. What they had begun ends with the error, the
        other requests are sent again: to another tokenizer at once, or when they are back."""
        requests = dict.fromkeys(output.request for output in self._outputs.values())
        if error is None:
            error = self._lost.pop(group)
            hit = [request for request in requests if not request.route]
        else:
            self._lost[group] = error
            self._fail_asked(error)
            hit = [request for request in requests if request.route]
            if group.startswith("tokenizer-"):  # it has nothing to do with those that it has passed on
                hit = [r for r in hit if r.route == group and r.message is not None and not r.is_accepted]
        is_blocked = not self._lost.keys().isdisjoint(("scheduler", DETOKENIZER))
        self._routes = [] if is_blocked else [name for name in self._tokenizers if name not in self._lost]
        for request in hit:
            self._recall(request, error)
        if not self._lost:  # a tokenizer may have these, or have passed them on before it died; nobody waits for them
            for route, uid in self._stale:
                self._tokenizers[route].send([AbortMsg(uid)])
                self._backend.send([AbortMsg(uid)])
            self._stale.clear()

    def _recall(self, request: _Request, error: WorkerDied) -> None:
        """Send a request again, unless it has begun, or was sent too often already: then it ends with this error."""
        alive = [output for output in request.outputs if self._outputs.pop(output.uid, None) is not None]
        if request.route:
            self._stale += [(request.route, output.uid) for output in alive]
        if request.message is not None and request.num_sent < MAX_SENT and len(alive) == len(request.outputs):
            self._send(request)
            return
        for output in alive:
            self._end(output, FinishReason.ERROR, error)

    async def _receive(self) -> None:
        while True:
            try:
                for message in await self._inbox.receive():
                    self._dispatch(message)
            except Exception as error:  # no memory, say; what is lost may be anybody's
                logger.exception("replies are lost")
                self.on_change("replies", WorkerDied(f"replies are lost: {error}"))
                self.on_change("replies", None)
                await asyncio.sleep(0.1)

    def _dispatch(self, message: FrontendMsg) -> None:
        output, answer, error = self._outputs.get(message.uid), self._asked.get(message.uid), None
        if isinstance(message, messages.ErrorReply):
            error = RequestError(message.message, param=message.param, code=message.code, status=message.status)
        if answer is not None and not answer.done():
            if error is None:
                answer.set_result(message)
            else:
                answer.set_exception(error)
        if output is None:
            return  # not an output's, or one that was aborted here while the reply was under way
        stream = output.request.stream
        if error is not None:
            self._end(output, FinishReason.ERROR, error)
        elif isinstance(message, UserReply):
            self.metrics.take(output.timing, message)
            if message.detokenized or message.finish_reason is not None:
                take(output.record, message)
            if message.finish_reason is not None:
                del self._outputs[message.uid]
            if message.finish_reason is FinishReason.ERROR:
                stream.fail(RequestError(message.error or "the request failed", status=message.error_status))
            else:
                stream.push(output, message)
        elif isinstance(message, messages.AcceptedReply):
            stream.accept(output)
