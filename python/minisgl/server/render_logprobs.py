"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from minisgl.message.frontend import UserReply
from minisgl.message.logprobs import TokenLogprob, TopLogprob


def chat_logprobs(replies: Sequence[UserReply]) -> dict[str, Any]:
    """`logprobs` of a chat's choice, or of a chunk of it."""
    content = [
        {**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]}
        for reply in replies
        for token in reply.logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": _text(token.token, ""), "logprob": token.logprob, "bytes": list(token.token)}


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
    alternatives always include the token itself.
    """
    tokens = [token for reply in replies for token in (*reply.prompt_logprobs, *reply.logprobs)]
    texts = [_text(token.token, "bytes:") for token in tokens]
    return {
        "text_offset": [cursor.pass_token(token.token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": texts,
        "top_logprobs": [
            None
            if token.logprob is None
            else {_text(top.token, "bytes:"): top.logprob for top in reversed(token.top)} | {text: token.logprob}
            for token, text in zip(tokens, texts, strict=True)
        ],
    }


def mean_logprob(replies: Sequence[UserReply]) -> float:
    """Per token of an output: what `best_of` ranks choices by."""
    values = [token.logprob or 0.0 for reply in replies for token in reply.logprobs]
    return sum(values) / max(1, len(values))


def _text(token: bytes, prefix: str) -> str:
    """A token as text; the bytes of one that is no text by itself are written out, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in token)
