"""The loop of a tokenizer or detokenizer process (or of one that is both)."""

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from queue import PriorityQueue

from msgspec.structs import replace

from minisgl.config.runtime import TokenizerConfig
from minisgl.core import FinishReason
from minisgl.message import messages as wire
from minisgl.message.sockets import Endpoints, PullSocket, PushSocket
from minisgl.tokenizer.detokenize import Detokenizer
from minisgl.tokenizer.tokenize import HFTextCodec, Tokenizer

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
MAX_BATCH = 64  # messages handled at a time: a crowd of long prompts must not look like silence
SHORT = 2**14  # bytes of a batch's prompts that are encoded at once: some milliseconds
NUM_THREADS, SECONDS = 2, 20.0  # for others

Answers = tuple[Sequence[wire.BackendMsg], Sequence[wire.FrontendMsg]]  # to the scheduler, and to the API server


class TooSlow(BaseException):
    """Not an Exception: whatever runs must not take it for its own."""


class TokenizerServer:
    """Handles every message of the tokenizer channel, so that one process can serve both directions.

    endpoint: where this process receives.
    A request or stream that cannot be handled ends with an error reply of its own; the loop goes on."""

    def __init__(
        self, config: TokenizerConfig, endpoints: Endpoints, endpoint: str, codec: HFTextCodec | None = None
    ) -> None:
        self._tokenizer = Tokenizer(config, codec)
        self._detokenizer = Detokenizer(self._tokenizer.codec)
        self._long = PriorityQueue[tuple[int, int, int, wire.TextMsg, list[wire.BackendMsg]]]()  # shortest first
        self._aborts: dict[int, list[wire.BackendMsg]] = {}  # by uid of what is long and not answered: of its request
        self._lock = threading.Lock()  # of what several threads use: the above, and the sockets that send
        for index in range(NUM_THREADS):
            threading.Thread(target=self._serve_long, name=f"long-{index}", daemon=True).start()
        self._inbox = PullSocket(endpoint, wire.tokenizer_codec)
        self._backend = PushSocket(endpoints.backend, wire.backend_codec)
        self._frontend = PushSocket(endpoints.frontend, wire.frontend_codec)

    def run(self, beat: Callable[[], None]) -> None:
        """Serve until an exception ends it. `beat` is called at least each second, and after `MAX_BATCH` messages."""
        sys.setswitchinterval(0.0005)  # seconds that another thread may keep this one waiting
        with closing(self):
            while True:
                messages = self._inbox.receive(POLL_SECONDS)
                beat()
                for first in range(0, len(messages), MAX_BATCH):
                    to_backend, to_frontend = self.handle(messages[first : first + MAX_BATCH])
                    with self._lock:
                        self._frontend.send(to_frontend)
                        self._backend.send(to_backend)
                    beat()

    def handle(self, messages: Sequence[wire.TokenizerMsg]) -> Answers:
        """What is to be sent now. A request's abort stays behind the request, which other threads may have."""
        to_backend: list[wire.BackendMsg] = []
        to_frontend: list[wire.FrontendMsg] = []
        room = SHORT
        for message in messages:
            onward: Answers = (), ()
            if isinstance(message, wire.DetokenizeMsg):
                onward = self._detokenized(message)
            elif isinstance(message, wire.AbortMsg):
                with self._lock:
                    self._aborts.get(message.uid, to_backend).append(message)
            elif isinstance(message, wire.FlushMsg):
                self._detokenizer = Detokenizer(self._tokenizer.codec)
            elif isinstance(message, wire.ErrorReply) or (isinstance(message, wire.PingMsg) and message.back):
                onward = (), (message,)
            elif isinstance(message, wire.PingMsg):
                onward = (message,), ()
            elif (size := _size(message)) < room:
                room -= size
                onward = self._answer(message)
            else:
                aborts: list[wire.BackendMsg] = []
                with self._lock:
                    self._aborts |= dict.fromkeys(_uids(message), aborts)
                self._long.put((size, message.uid, id(aborts), message, aborts))
            to_backend += onward[0]
            to_frontend += onward[1]
        return to_backend, to_frontend

    def close(self) -> None:
        self._lock.acquire()  # for good: other threads must not send any more
        for socket in (self._inbox, self._backend, self._frontend):
            socket.close()

    def _answer(self, message: wire.TextMsg) -> Answers:
        answer = self._tokenizer.answer(message)
        if not isinstance(answer, wire.UserMsg):
            return [], [replace(answer, uid=uid) for uid in _uids(message)]
        notify = isinstance(message, wire.TokenizeMsg) and message.notify and message.params.grammar is None
        return [answer], [wire.AcceptedReply(uid) for uid in answer.uids if notify]

    def _serve_long(self) -> None:
        """A thread for what would keep others waiting."""
        if sys.platform == "linux":  # a little behind the engine's; much, and it would hold Python's lock for long
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        while True:
            *_, message, aborts = self._long.get()
            to_backend, to_frontend = self._answer_in_time(message, aborts)
            with self._lock:
                for uid in _uids(message):
                    self._aborts.pop(uid, None)
                self._frontend.send(to_frontend)
                self._backend.send([*to_backend, *aborts])

    def _answer_in_time(self, message: wire.TextMsg, aborts: Sequence[wire.BackendMsg]) -> Answers:
        """What takes too long is interrupted where it runs Python, as chat templates do."""
        uids = _uids(message)
        if len(aborts) == len(uids):  # nobody waits for it any more
            return [], [wire.UserReply(uid, "", b"", 0, 0, 0, FinishReason.ABORT) for uid in uids]
        thread, error = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(TooSlow)
        timer = threading.Timer(SECONDS, ctypes.pythonapi.PyThreadState_SetAsyncExc, [thread, error])
        try:
            timer.start()
            answers = self._answer(message)
            timer.cancel()
            timer.join()
            return answers
        except TooSlow:
            status, reason = 400, f"the prompt takes longer than {SECONDS:g} s to read"
        except Exception as problem:  # there is no thread left for the timer, say
            status, reason = 503, f"the prompt cannot be read now: {problem}"
        return [], [wire.ErrorReply(uid, reason, status=status) for uid in uids]

    def _detokenized(self, message: wire.DetokenizeMsg) -> Answers:
        try:
            reply, abort = self._detokenizer.detokenize(message)
            return (abort,) if abort else (), (reply,) if reply else ()
        except Exception as error:
            logger.exception("request %d: detokenization failed", message.uid)
            self._detokenizer.drop(message.uid)
            text = f"detokenization failed: {type(error).__name__}"
            return [wire.AbortMsg(message.uid)], [wire.ErrorReply(message.uid, text, status=500)]


def _uids(message: wire.TextMsg) -> Sequence[int]:
    return message.uids if isinstance(message, wire.TokenizeMsg) else (message.uid,)


def _size(message: wire.TextMsg) -> int:
    """How long it takes, roughly: its bytes. To a number, a template may count."""
    prompt = getattr(message, "prompt", None)
    values = prompt.template_kwargs.values() if isinstance(prompt, wire.ChatPrompt) else ()
    return SHORT * any(type(value) not in (bool, str) for value in values) + len(wire.tokenizer_codec.encode([message]))
