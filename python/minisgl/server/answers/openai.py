"""Replies as /v1/chat/completions and /v1/completions show them, with log-probabilities; and as /generate does."""

from abc import abstractmethod
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from minisgl.message.messages import TokenLogprob, TopLogprob, UserReply, unpack_ids
from minisgl.server.answers.renderer import Assembler, Block, Events, Renderer


@dataclass(eq=False)
class _OpenAIRenderer(Renderer):
    """What both have in common."""

    whole, part = "", ""  # what the answer and a chunk call themselves

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head = {"id": self.id, "created": self.created, "model": self.model}

    def last_chunks(self) -> Events:
        usage = {**self._head, "object": self.part, "choices": [], "usage": self.usage()}
        return [usage] if self.request.include_usage else []

    def body(self, choices: Sequence[Sequence[UserReply]]) -> dict[str, Any]:
        shown = [self._choice(index, replies) for index, replies in enumerate(choices)]
        return {**self._head, "object": self.whole, "choices": shown, "usage": self.usage()}

    @abstractmethod
    def _choice(self, index: int, replies: Sequence[UserReply]) -> dict[str, Any]:
        """What these replies say of a choice."""

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head, "object": self.part, "choices": [choice], **usage}


@dataclass(eq=False)
class ChatRenderer(_OpenAIRenderer):
    """/v1/chat/completions."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    assemblers: list[Assembler] = field(default_factory=list, init=False)  # by choice

    def chunk(self, index: int, reply: UserReply) -> Events:
        chunks = []
        for begun in range(len(self.assemblers), index + 1):  # in order: clients number choices as they begin
            chunks.append(self._delta(begun, {"role": "assistant", "content": ""}))
            self.assemblers.append(self.new_assembler())
        assembler = self.assemblers[index]
        deltas = assembler.read(reply, self)
        if self.request.logprobs and reply.logprobs:  # with the first delta, if need be an empty one
            deltas = deltas or [{"content": ""}]
            chunks.append(self._delta(index, deltas.pop(0), logprobs=chat_logprobs([reply])))
        chunks += [self._delta(index, delta) for delta in deltas]
        if reply.finish_reason is not None:
            chunks.append(self._delta(index, {}, finish_reason=assembler.finish_reason(reply)))
        return chunks

    def begin(self, block: Block) -> Events:
        if block.kind != "call":
            return []
        return [{"tool_calls": [{"index": block.part.call_index, **_call(block, "")}]}]

    def more(self, block: Block, text: str) -> Events:
        if block.kind == "call":
            return [{"tool_calls": [{"index": block.part.call_index, "function": {"arguments": text}}]}]
        return [{"content" if block.kind == "text" else "reasoning_content": text}]

    def _choice(self, index: int, replies: Sequence[UserReply]) -> dict[str, Any]:
        assembler = self.new_assembler()
        self.assemblers.append(assembler)
        for reply in replies:
            assembler.read(reply, self)
        logprobs = chat_logprobs(replies) if self.request.logprobs else None
        told = {"logprobs": logprobs, "finish_reason": assembler.finish_reason(replies[-1])}
        return {"index": index, "message": _message(assembler.blocks), **told}

    def usage(self) -> dict[str, Any]:
        num_reasoning = sum(assembler.num_reasoning for assembler in self.assemblers)
        usage = super().usage()
        details = {"reasoning_tokens": num_reasoning, **usage.get("completion_tokens_details", {})}
        return {**usage, "completion_tokens_details": details}

    def _delta(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more})


def _message(blocks: Sequence[Block]) -> dict[str, Any]:
    content, reasoning = ("".join(b.text for b in blocks if b.kind == kind) for kind in ("text", "reasoning"))
    calls = [_call(block, block.text) for block in blocks if block.kind == "call"]
    nothing = None if calls or reasoning else ""
    more = {"reasoning_content": reasoning, "tool_calls": calls}
    message = {"role": "assistant", "content": content or nothing, "refusal": None}
    return message | {name: value for name, value in more.items() if value}


def _call(block: Block, arguments: str) -> dict[str, Any]:
    return {"id": block.call_id, "type": "function", "function": {"name": block.part.name, "arguments": arguments}}


@dataclass(eq=False)
class CompletionRenderer(_OpenAIRenderer):
    """/v1/completions."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    # How far into its text a choice's tokens are, and what decodes them. A character belongs to the token that ends it.
    offsets: dict[int, int] = field(default_factory=dict, init=False)
    decoders: dict[int, IncrementalDecoder] = field(default_factory=dict, init=False)

    def chunk(self, index: int, reply: UserReply) -> Events:
        if index in self.offsets and not (reply.text or reply.finish_reason is not None or reply.logprobs):
            return []
        return [self._chunk(self._choice(index, [reply]))]

    def _choice(self, index: int, replies: Sequence[UserReply]) -> dict[str, Any]:
        decoder = self.decoders.setdefault(index, getincrementaldecoder("utf-8")("replace"))
        tokens = [token for reply in replies for token in (*reply.prompt_logprobs, *reply.logprobs)]
        lengths = (len(decoder.decode(token.token if token.is_text else b"")) for token in tokens)
        *offsets, self.offsets[index] = accumulate(lengths, initial=self.offsets.get(index, 0))
        logprobs = completion_logprobs(tokens, offsets) if self.request.logprobs else None
        told = {"logprobs": logprobs, "finish_reason": replies[-1].finish_reason}
        return {"text": "".join(reply.text for reply in replies), "index": index, **told}


class GenerateRenderer(Renderer):
    """/generate: text and token ids, with counts in `meta_info`; streams send increments."""

    def chunk(self, index: int, reply: UserReply) -> Events:  # noqa: ARG002
        return [self._shown([reply])]

    def body(self, choices: Sequence[Sequence[UserReply]]) -> dict[str, Any]:
        return self._shown(choices[0])

    def _shown(self, replies: Sequence[UserReply]) -> dict[str, Any]:
        last = replies[-1]
        counts = {"prompt_tokens": last.num_prompt_tokens, "completion_tokens": last.num_output_tokens}
        told = {**counts, "cached_tokens": last.num_cached_tokens}
        return {
            "text": "".join(reply.text for reply in replies),
            "output_ids": unpack_ids(b"".join(reply.token_ids for reply in replies)),
            "meta_info": {"id": self.id, "finish_reason": last.finish_reason, **told},
        }


def chat_logprobs(replies: Sequence[UserReply]) -> dict[str, Any]:
    """`logprobs` of a chat's choice, or of a chunk of it."""
    tokens = (token for reply in replies for token in reply.logprobs)
    shown = [{**_chat_token(token), "top_logprobs": [*map(_chat_token, token.top)]} for token in tokens]
    return {"content": shown, "refusal": None}


def _chat_token(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": _spelled(token.token, ""), "logprob": token.logprob, "bytes": list(token.token)}


def completion_logprobs(tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
    """`logprobs` of a completion's choice, or of a chunk of it. offsets: of the tokens, in the choice's text.

    A prompt's tokens come first, where they were asked for; nothing precedes its first token, which has no values. The
    alternatives always include the token itself. Of different tokens with one text the most probable one is shown.
    """
    texts = [_spelled(token.token, "bytes:") for token in tokens]
    values = [token.logprob for token in tokens]
    tops = ({_spelled(top.token, "bytes:"): top.logprob for top in reversed(token.top)} for token in tokens)
    shown = [None if own is None else {text: own} | top for text, own, top in zip(texts, values, tops, strict=True)]
    return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": shown}


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
