"""The loop of a tokenizer or detokenizer process (or of one that is both)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from minisgl.config.runtime import Addresses, TokenizerConfig
from minisgl.errors import RequestError
from minisgl.message.backend import AbortMsg, BackendMsg, FlushMsg, PingMsg, backend_codec
from minisgl.message.codec import pack_ids, unpack_ids
from minisgl.message.frontend import (
    AcceptedReply,
    DecodedReply,
    EncodedReply,
    ErrorReply,
    FrontendMsg,
    PongReply,
    frontend_codec,
)
from minisgl.message.tokenizer import DecodeMsg, DetokenizeMsg, EncodeMsg, TokenizeMsg, TokenizerMsg, tokenizer_codec
from minisgl.tokenizer.detokenize import Detokenizer
from minisgl.tokenizer.tokenize import TextCodec, Tokenizer
from minisgl.utils.faults import fault
from minisgl.utils.sockets import PullSocket, PushSocket

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
MAX_BATCH = 64  # messages handled at a time: a crowd of long prompts must not look like silence


class TokenizerServer:
    """Handles every message of the tokenizer channel, so that one process can serve both directions.

    endpoint: where this process receives.
    A request or stream that cannot be handled ends with an error reply of its own; the loop goes on.
    """

    def __init__(
        self, config: TokenizerConfig, addresses: Addresses, endpoint: str, codec: TextCodec | None = None
    ) -> None:
        self._tokenizer = Tokenizer(config, codec)
        self._detokenizer = Detokenizer(self._tokenizer.codec)
        self._pings: set[int] = set()  # gone to the scheduler and not back yet, where both directions meet here
        self._is_detokenizer = endpoint == addresses.detokenizer
        self._is_tokenizer = not self._is_detokenizer or addresses.num_tokenizer == 0
        self._inbox = PullSocket(endpoint, tokenizer_codec)
        self._backend = PushSocket(addresses.backend, backend_codec)
        self._frontend = PushSocket(addresses.frontend, frontend_codec)

    def run(self, beat: Callable[[], None]) -> None:
        """Serve until an exception (the one that SIGTERM raises) ends it. `beat` is called at least each second,
        and after every `MAX_BATCH` messages."""
        try:
            while True:
                messages = self._inbox.receive(POLL_SECONDS)
                beat()
                for first in range(0, len(messages), MAX_BATCH):
                    fault("message")
                    to_backend, to_frontend = self.handle(messages[first : first + MAX_BATCH])
                    self._frontend.send(to_frontend)
                    self._backend.send(to_backend)
                    beat()
        finally:
            self.close()

    def handle(self, messages: Sequence[TokenizerMsg]) -> tuple[list[BackendMsg], list[FrontendMsg]]:
        """What goes to the scheduler and to the API server. A request's abort stays behind the request."""
        to_backend: list[BackendMsg] = []
        to_frontend: list[FrontendMsg] = []
        for request in messages:
            if not isinstance(request, TokenizeMsg):
                continue
            answer = self._tokenizer.answer(request)
            if isinstance(answer, ErrorReply):
                to_frontend += [replace(answer, uid=uid) for uid in request.uids]
                continue
            to_backend.append(answer)
            if request.notify and request.params.grammar is None:
                to_frontend += map(AcceptedReply, request.uids)
        for message in messages:
            if isinstance(message, DetokenizeMsg):
                self._detokenize(message, to_backend, to_frontend)
            elif isinstance(message, AbortMsg):
                to_backend.append(message)
            elif isinstance(message, FlushMsg):
                self._detokenizer = Detokenizer(self._tokenizer.codec)
                self._pings.clear()
            elif isinstance(message, ErrorReply):
                to_frontend.append(message)
            elif isinstance(message, PingMsg):
                self._ping(message, to_backend, to_frontend)
            elif isinstance(message, (EncodeMsg, DecodeMsg)):
                to_frontend.append(self._answer(message))
        return to_backend, to_frontend

    def close(self) -> None:
        for socket in (self._inbox, self._backend, self._frontend):
            socket.close()

    def _detokenize(self, message: DetokenizeMsg, to_backend: list[BackendMsg], to_frontend: list[FrontendMsg]) -> None:
        try:
            reply, abort = self._detokenizer.detokenize(message)
        except Exception as error:
            logger.exception("request %d: detokenization failed", message.uid)
            self._detokenizer.drop(message.uid)
            to_frontend.append(
                ErrorReply(uid=message.uid, message=f"detokenization failed: {type(error).__name__}", status=500)
            )
            to_backend.append(AbortMsg(uid=message.uid))
            return
        if reply is not None:
            to_frontend.append(reply)
        if abort is not None:
            to_backend.append(abort)

    def _answer(self, message: EncodeMsg | DecodeMsg) -> FrontendMsg:
        try:
            if isinstance(message, EncodeMsg):
                ids = self._tokenizer.encode_only(message.prompt, special=message.special)
                return EncodedReply(message.uid, pack_ids(ids))
            ids = unpack_ids(message.token_ids)
            return DecodedReply(message.uid, self._tokenizer.decode_only(ids, skip_special=message.skip_special))
        except RequestError as error:
            return ErrorReply(message.uid, str(error), error.status, error.param, error.code)
        except Exception as error:
            logger.exception("/tokenize or /detokenize failed")
            return ErrorReply(message.uid, f"tokenization failed: {type(error).__name__}", 500)

    def _ping(self, message: PingMsg, to_backend: list[BackendMsg], to_frontend: list[FrontendMsg]) -> None:
        """A tokenizer passes a ping on, the detokenizer answers it; a process that is both sees it twice."""
        if self._is_tokenizer and not (self._is_detokenizer and message.uid in self._pings):
            if self._is_detokenizer:
                self._pings.add(message.uid)
            to_backend.append(message)
        else:
            self._pings.discard(message.uid)
            to_frontend.append(PongReply(uid=message.uid))
