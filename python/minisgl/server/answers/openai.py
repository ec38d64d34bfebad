"""Replies as clients expect them: JSON bodies, SSE events, log-probabilities; in OpenAI's shapes and ours."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic_core import from_json

from minisgl.errors import MiniSGLError
from minisgl.message.codec import unpack_ids
from minisgl.message.frontend import TokenLogprob, TopLogprob, UserReply
from minisgl.server.answers.assemble import Assembler
from minisgl.server.errors import error_payload
from minisgl.server.json_line import dump_json

DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One SSE event, named by its `type` if it has one. The JSON is one line, so text cannot break it."""
    name = payload.get("type")
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dump_json(payload) + b"\n\n"


def partial_object(arguments: str) -> dict[str, Any]:
    """The arguments of a call, or what there is of them where it was cut off."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Totals:
    """Token counts of all choices of one request. A prompt counts once, however many choices it has."""

    def __init__(self, num_choices: int, n: int) -> None:
        self._last: list[UserReply | None] = [None] * num_choices
        self._n = n

    def add(self, index: int, reply: UserReply) -> None:
        self._last[index] = reply

    def usage(self) -> dict[str, Any]:
        first_of_prompt = [reply for reply in self._last[:: self._n] if reply is not None]
        num_prompt = sum(reply.num_prompt_tokens for reply in first_of_prompt)
        num_output = sum(reply.num_output_tokens for reply in self._last if reply is not None)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(reply.num_cached_tokens for reply in first_of_prompt)},
        }


class Renderer(Protocol):
    """One endpoint's way to show a request's replies."""

    id: str  # what the answer is called in itself
    done: bytes = DONE  # what ends a stream that went well
    keep_alive: bytes = b": keep-alive\n\n"  # sent when there has been nothing else to send for a while

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:
        """The events for an increment of choice `index`."""

    def last_chunks(self, totals: Totals) -> list[dict[str, Any]]:  # noqa: ARG002
        """The events after the last choice: the usage, for clients that asked for it."""
        return []

    def failure(self, error: MiniSGLError) -> list[dict[str, Any]]:
        """The events at the end of a stream that failed after it began."""
        return [error_payload(error)]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        """The whole answer of a request that does not stream: the replies to each choice."""


class _OpenAIRenderer(Renderer):
    """What the answers of /v1/chat/completions and /v1/completions have in common."""

    _prefix, _whole, _part = "", "", ""  # what the id begins with; what the answer and a chunk call themselves

    def __init__(self, model: str, *, include_usage: bool, logprobs: bool = False) -> None:
        self._include_usage, self._logprobs = include_usage, logprobs
        self.id = f"{self._prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def last_chunks(self, totals: Totals) -> list[dict[str, Any]]:
        usage = {**self._head, "object": self._part, "choices": [], "usage": self._usage(totals)}
        return [usage] if self._include_usage else []

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:
        shown = [self._choice(index, replies) for index, replies in enumerate(choices)]
        return {**self._head, "object": self._whole, "choices": shown, "usage": self._usage(totals)}

    @abstractmethod
    def _choice(self, index: int, replies: Sequence[UserReply]) -> dict[str, Any]:
        """What these replies say of a choice."""

    def _usage(self, totals: Totals) -> dict[str, Any]:
        return totals.usage()

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": self._part, "choices": [choice], **usage}


class ChatRenderer(_OpenAIRenderer):
    """/v1/chat/completions. `new_assembler` makes what reads one choice."""

    _prefix, _whole, _part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, *, new_assembler: Callable[[], Assembler] = Assembler, **options: bool) -> None:
        super().__init__(model, **options)
        self._new_assembler = new_assembler
        self._assemblers: dict[int, Assembler] = {}  # by choice

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        chunks = []
        for begun in range(len(self._assemblers), index + 1):  # in order: clients number choices as they begin
            chunks.append(self._delta(begun, {"role": "assistant", "content": ""}))
            self._assemblers[begun] = self._new_assembler()
        assembler = self._assemblers[index]
        deltas = assembler.deltas(reply)
        if self._logprobs and reply.logprobs:  # with the first delta, if need be an empty one
            deltas = deltas or [{"content": ""}]
            chunks.append(self._delta(index, deltas.pop(0), logprobs=chat_logprobs([reply])))
        chunks += [self._delta(index, delta) for delta in deltas]
        if reply.finish_reason is not None:
            chunks.append(self._delta(index, {}, finish_reason=assembler.finish_reason(reply)))
        return chunks

    def _choice(self, index: int, replies: Sequence[UserReply]) -> dict[str, Any]:
        assembler = self._assemblers[index] = self._new_assembler()
        return {
            "index": index,
            "message": assembler.message(replies),
            "logprobs": chat_logprobs(replies) if self._logprobs else None,
            "finish_reason": assembler.finish_reason(replies[-1]),
        }

    def _usage(self, totals: Totals) -> dict[str, Any]:
        num_reasoning = sum(assembler.num_reasoning for assembler in self._assemblers.values())
        return {**totals.usage(), "completion_tokens_details": {"reasoning_tokens": num_reasoning}}

    def _delta(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more})


class CompletionRenderer(_OpenAIRenderer):
    """/v1/completions."""

    _prefix, _whole, _part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, **options: bool) -> None:
        super().__init__(model, **options)
        self._cursors: defaultdict[int, TextCursor] = defaultdict(TextCursor)  # by choice

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:
        if not (reply.text or first or reply.finish_reason is not None or reply.logprobs):
            return []
        return [self._chunk(self._choice(index, [reply]))]

    def _choice(self, index: int, replies: Sequence[UserReply]) -> dict[str, Any]:
        logprobs = completion_logprobs(replies, self._cursors[index]) if self._logprobs else None
        choice = {"text": _text(replies), "index": index, "logprobs": logprobs}
        return {**choice, "finish_reason": replies[-1].finish_reason}


class GenerateRenderer(Renderer):
    """/generate: text and token ids, with counts in `meta_info`; streams send increments."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex

    def chunk(self, index: int, reply: UserReply, *, first: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        return [self._shown([reply])]

    def body(self, choices: Sequence[Sequence[UserReply]], totals: Totals) -> dict[str, Any]:  # noqa: ARG002
        return self._shown(choices[0])

    def _shown(self, replies: Sequence[UserReply]) -> dict[str, Any]:
        last = replies[-1]
        return {
            "text": _text(replies),
            "output_ids": unpack_ids(b"".join(reply.token_ids for reply in replies)),
            "meta_info": {
                "id": self.id,
                "finish_reason": last.finish_reason,
                "prompt_tokens": last.num_prompt_tokens,
                "completion_tokens": last.num_output_tokens,
                "cached_tokens": last.num_cached_tokens,
            },
        }


def _text(replies: Sequence[UserReply]) -> str:
    return "".join(reply.text for reply in replies)


def chat_logprobs(replies: Sequence[UserReply]) -> dict[str, Any]:
    """`logprobs` of a chat's choice, or of a chunk of it."""
    content = [
        {**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]}
        for reply in replies
        for token in reply.logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": _spelled(token.token, ""), "logprob": token.logprob, "bytes": list(token.token)}


class TextCursor:
    """How far into its text a choice's tokens are. A character belongs to the token that ends it."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def pass_token(self, token: bytes) -> int:
        """Where the token begins."""
        begin = self._offset
        self._offset += len(self._decoder.decode(token))
        return begin


def completion_logprobs(replies: Sequence[UserReply], cursor: TextCursor) -> dict[str, Any]:
    """`logprobs` of a completion's choice, or of a chunk of it, which the cursor passes.

    A prompt's tokens come first, where they were asked for; nothing precedes its first token, which has no values. The
    alternatives always include the token itself. Of different tokens with one text the most probable one is shown.
    """
    tokens = [token for reply in replies for token in (*reply.prompt_logprobs, *reply.logprobs)]
    texts = [_spelled(token.token, "bytes:") for token in tokens]
    return {
        "text_offset": [cursor.pass_token(token.token if token.is_text else b"") for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": texts,
        "top_logprobs": [
            None
            if token.logprob is None
            else {text: token.logprob} | {_spelled(top.token, "bytes:"): top.logprob for top in reversed(token.top)}
            for token, text in zip(tokens, texts, strict=True)
        ],
    }


def mean_logprob(replies: Sequence[UserReply]) -> float:
    """Per token of an output: what `best_of` ranks choices by."""
    values = [token.logprob or 0.0 for reply in replies for token in reply.logprobs]
    return sum(values) / max(1, len(values))


def _spelled(token: bytes, prefix: str) -> str:
    """A token as text; the bytes of one that is no text by itself are written out, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in token)
