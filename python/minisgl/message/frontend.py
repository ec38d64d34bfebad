"""To the API server: increments of text (from the detokenizer), refusals (from the tokenizers), answers to pings."""

from __future__ import annotations

import msgspec

from minisgl.core import FinishReason
from minisgl.message.codec import Codec
from minisgl.message.logprobs import TokenLogprob


class UserReply(msgspec.Struct, frozen=True, tag="reply", forbid_unknown_fields=True):
    """More output of a request. Counts are running totals. Exactly one reply per uid has a `finish_reason`."""

    uid: int
    text: str
    token_ids: bytes
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] = []  # of `token_ids`, and with the first reply of the prompt, where they are wanted
    prompt_logprobs: list[TokenLogprob] = []
    prompt_end: str = ""  # in the first reply: the text of the prompt's last tokens


class ErrorReply(msgspec.Struct, frozen=True, tag="error", forbid_unknown_fields=True):
    """The request was refused before it reached the scheduler; the terminal reply of its uid."""

    uid: int
    message: str
    status: int = 400
    param: str | None = None


class PongReply(msgspec.Struct, frozen=True, tag="pong", forbid_unknown_fields=True):
    """A ping came round through tokenizer, scheduler and detokenizer."""

    uid: int


FrontendMsg = UserReply | ErrorReply | PongReply
frontend_codec: Codec[FrontendMsg] = Codec(FrontendMsg)
