"""To the tokenizers (from the API server) and to the detokenizer (from scheduler rank 0)."""

from __future__ import annotations

from typing import Any

import msgspec

from minisgl.core import FinishReason
from minisgl.message.backend import AbortMsg, FlushMsg, PingMsg
from minisgl.message.codec import Codec, Message, Part, Request
from minisgl.message.frontend import ErrorReply, PackedLogprobs

LONGEST_TOKEN = 512  # bytes: no model has a longer one; a tokenizer knows how long its own are
PROMPT_TAIL = 16  # prompt ids that say how the prompt ends: more than a tag and whitespace, spelled out, have


class ChatPrompt(Part, frozen=True):
    """Messages for the chat template, as the template expects them (OpenAI's shape).

    add_generation_prompt: the prompt ends where an assistant begins to speak. continue_final: instead it ends in the
    middle of the last message, which is an assistant's and goes on.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False


class TextPrompt(Part, frozen=True):
    """Plain text: encoded with the tokenizer's own special tokens (BOS, where the model has one)."""

    text: str


class IdsPrompt(Part, frozen=True):
    """Token ids, packed; used as they are."""

    input_ids: bytes


Prompt = ChatPrompt | TextPrompt | IdsPrompt


def least_tokens(prompt: Prompt) -> int:
    """So many tokens a prompt has at least, whatever the tokenizer."""
    if isinstance(prompt, IdsPrompt):
        return len(prompt.input_ids) // 4
    return len(msgspec.msgpack.encode(prompt)) // LONGEST_TOKEN


class TokenizeMsg(Request[Prompt], frozen=True):
    """A new request. `params.max_tokens` may be None (the tokenizer fills in what the context has room for).

    notify: answer with an `AcceptedReply`, unless the scheduler may still refuse the request for its grammar.
    """

    notify: bool = False


class EncodeMsg(Message, frozen=True):
    """Asks for the token ids of a prompt, and no more: `EncodedReply`, or `ErrorReply`."""

    prompt: ChatPrompt | TextPrompt
    special: bool = True  # with the frame of special tokens around plain text


class DecodeMsg(Message, frozen=True):
    """Asks for the text of token ids: `DecodedReply`, or `ErrorReply`."""

    token_ids: bytes
    skip_special: bool = True


class StreamStart(Part, frozen=True):
    """What the detokenizer must know of a request, sent with its first message."""

    num_prompt_tokens: int
    stop: tuple[str, ...]
    prompt_tail: bytes  # the last few prompt ids, packed: some tokenizers decode a token by what precedes it
    include_stop: bool = False  # stop strings stay in the text
    skip_special: bool = True
    min_tokens: int = 0  # stop strings are not looked for in the text of so many first tokens
    echo: bool = False  # the text begins with the prompt's
    prompt: bytes = b""  # all prompt ids, packed, where they are to be shown


class DetokenizeMsg(Message, frozen=True):
    """New output tokens of a request. The last message has `finish_reason`, with `error` text if it is `error`.

    An end-of-sequence token that ended the request is part of `token_ids`; `num_hidden` of the last ids (0 or 1) are
    such and never become text.
    """

    token_ids: bytes
    num_cached: int = 0
    num_hidden: int = 0
    start: StreamStart | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_status: int = 500
    logprobs: PackedLogprobs | None = None  # of `token_ids`
    prompt_logprobs: PackedLogprobs | None = None  # of all prompt ids but the first


TextMsg = TokenizeMsg | EncodeMsg | DecodeMsg
# An error reply is of the scheduler's, to a request that it does not take; the detokenizer passes it on. A flush is
# of a scheduler that begins: nothing more comes for any uid that the detokenizer knows.
TokenizerMsg = TextMsg | DetokenizeMsg | AbortMsg | PingMsg | ErrorReply | FlushMsg
tokenizer_codec: Codec[TokenizerMsg] = Codec(TokenizerMsg)
