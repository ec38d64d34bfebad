"""To the API server: increments of text (from the detokenizer), refusals (from the tokenizers), and answers to what is
not about one request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from minisgl.core import FinishReason, TokenLogprobs
from minisgl.message.backend import PingMsg
from minisgl.message.codec import Codec, Message
from minisgl.utils.math import Histogram

LEAST = -9999.0  # for what is less, or no number: JSON has no infinities, and this is OpenAI's


class PackedLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`TokenLogprobs` as little-endian bytes."""

    chosen: bytes  # [n] float32
    top_ids: bytes  # [n, k] int32
    top: bytes  # [n, k] float32


class TopLogprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One of the most probable tokens at a position. `token`: the bytes that it stands for."""

    token_id: int
    token: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A token of a prompt or an output. `logprob` is None for a prompt's first token, which nothing precedes."""

    token_id: int
    token: bytes
    logprob: float | None
    top: list[TopLogprob]
    is_text: bool = True  # part of the text: no special token, unless those are


def pack_logprobs(parts: Sequence[TokenLogprobs]) -> PackedLogprobs:
    """One record of all parts, one after the other."""
    chosen, top_ids, top = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    chosen, top = (np.where(values > LEAST, values, LEAST).astype("<f4") for values in (chosen, top))
    return PackedLogprobs(chosen.tobytes(), top_ids.astype("<i4").tobytes(), top.tobytes())


def unpack_logprobs(packed: PackedLogprobs) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each token its log-probability, and (id, log-probability) of the most probable ones."""
    chosen = np.frombuffer(packed.chosen, "<f4")
    top_ids = np.frombuffer(packed.top_ids, "<i4").reshape(len(chosen), -1)
    top = np.frombuffer(packed.top, "<f4").reshape(len(chosen), -1)
    return [
        (logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen.tolist(), top_ids.tolist(), top.tolist(), strict=True)
    ]


class UserReply(Message, frozen=True):
    """More output of a request. Counts are running totals. Exactly one reply per uid has a `finish_reason`."""

    text: str
    token_ids: bytes
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_status: int = 500  # HTTP's
    # Of `token_ids`, and with the first reply of the prompt, where they are wanted. Not lists: an empty tuple is no
    # work for the garbage collector, and there is one reply for each token.
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_end: str = ""  # in the first reply: the text of the prompt's last tokens
    stop: str | None = None  # in the last: the stop string that ended it


class AcceptedReply(Message, frozen=True):
    """The prompt is encoded and fits: the request has gone on to the scheduler."""


class ErrorReply(Message, frozen=True):
    """The request was refused before it reached the scheduler; the terminal reply of its uid."""

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None


class EncodedReply(Message, frozen=True):
    """The token ids of an `EncodeMsg`."""

    token_ids: bytes


class DecodedReply(Message, frozen=True):
    """The text of a `DecodeMsg`."""

    text: str


class StatsReply(Message, frozen=True):
    """What rank 0 is doing, and what it has done since it started."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int  # those of the prefix cache that nobody uses included
    num_retracted: int
    step_requests: Histogram  # per step
    step_tokens: Histogram


class FlushReply(Message, frozen=True):
    """The prefix cache was flushed; so many pages were freed."""

    num_pages: int


FrontendMsg = UserReply | AcceptedReply | ErrorReply | PingMsg | EncodedReply | DecodedReply | StatsReply | FlushReply
frontend_codec: Codec[FrontendMsg] = Codec(FrontendMsg)
