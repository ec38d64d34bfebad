"""Token ids to text, increment by increment, and the end of a request at a stop string."""

import time
from collections import UserList
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

from msgspec.structs import replace

from minisgl.core import FinishReason, Logprobs
from minisgl.message import messages as wire
from minisgl.tokenizer.tokenize import HFTextCodec

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet
MAX_PENDING = 8  # tokens without a clean end; an unfinished character has 3 at most, so more are not one


class IncrementalDecoder:
    """Decodes one stream. The increments, put together, are the decoding of all tokens at once.

    A token's text depends on its neighbours: characters of several bytes spread over tokens, and sentencepiece-style
    tokenizers drop the first space of what they decode. So, but for tokens that are `whole`, a window is decoded again
    at each push: tokens that are already out as context (`num_context` of `ids`), and those since the text last ended
    in a whole character. It is bounded, so a push is O(1). Only a tail of U+FFFD, which may begin a character, waits.

    context: the last prompt tokens."""

    def __init__(self, codec: HFTextCodec, context: Sequence[int] = (), *, skip_special: bool = True) -> None:
        self._codec, self._skip_special = codec, skip_special
        self._ids = codec.visible(context, skip_special=skip_special)
        self._num_context = len(self._ids)
        self.context_text = self._codec.text(self._ids)
        self._num_chars = len(self.context_text)  # of the window's text that are out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain after these tokens and was not before."""
        # One by one: byte fallback makes U+FFFD of a whole run of bytes while its last character is unfinished.
        texts: list[str] = []  # `list[str]()` would take as long as all the rest
        for token in token_ids:
            if (text := self._codec.whole(token)) and len(self._ids) == self._num_context:  # nothing waits
                self._ids, self._num_context, self._num_chars = [token], 1, len(text)
                texts.append(text)
            elif self._codec.visible((token,), skip_special=self._skip_special):
                texts.append(self._push(token))
        return "".join(texts)

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._codec.text(self._ids)
        end = len(text.rstrip(REPLACEMENT))
        delta = text[self._num_chars : end]
        self._num_chars = max(self._num_chars, end)
        if end == len(text):
            # A context without text would lose the space that the next token may begin with.
            if delta or len(self._ids) - self._num_context > MAX_PENDING:
                self._advance(len(self._ids))
        elif len(self._ids) - self._num_context > MAX_PENDING:
            delta += self._release(text)
        return delta

    def flush(self) -> str:
        """What still waits, at the end of the stream."""
        return self._codec.text(self._ids)[self._num_chars :]

    def _advance(self, split: int) -> None:
        """All tokens before `split` are out: the pending ones become the context."""
        pending = self._num_context
        self._ids, self._num_context = self._ids[pending:], split - pending
        self._num_chars = len(self._codec.text(self._ids[: self._num_context]))

    def _release(self, text: str) -> str:
        """Bytes that are no text: let them out but for the last tokens, which may begin a character."""
        size = len(self._ids)
        for split in (size - 3, size - 2, size - 1, size):
            head = self._codec.text(self._ids[:split])
            if len(head) + len(self._codec.text(self._ids[split:])) == len(text):
                break
        delta = head[self._num_chars :]
        num_ahead = max(0, self._num_chars - len(head))  # whole characters behind the split are out already
        self._advance(split)
        self._num_chars += num_ahead
        return delta


class StopFinder:
    """Cuts a stream at the first stop string to be complete; of several that end together, at the longest.

    Holds back only text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include  # the stop string stays
        self.stops = tuple(stops)
        self._max_len, self._held = max(map(len, self.stops), default=0), ""
        self.found: str | None = None  # the stop string that was

    def push(self, text: str) -> tuple[str, bool]:
        """The text to let out, and whether a stop string was found (then it ends there)."""
        if not self.stops:
            return text, False
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if matches:
            self._held, (end, start) = "", min(matches)
            self.found = text[start:end]
            return text[: end if self._include else start], True
        counts = range(min(len(text), self._max_len - 1), 0, -1)
        keep = next((n for n in counts if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _Stream:
    """One request's output so far."""

    def __init__(self, codec: HFTextCodec, start: wire.StreamStart | None) -> None:
        self.start = start = start or wire.StreamStart(0, (), b"")
        self.decoder = IncrementalDecoder(codec, wire.unpack_ids(start.prompt_tail), skip_special=start.skip_special)
        self.stop = StopFinder(start.stop, include=start.include_stop)
        self.stopped = False  # the terminal reply went out at a stop string
        self.num_output = self.num_cached = 0


class LateLogprobs(UserList[wire.TokenLogprob]):
    """Log-probabilities, which are made when somebody first looks at them: that is most of what they cost."""

    def __init__(self, values: Iterable[wire.TokenLogprob] | Callable[[], Iterable[wire.TokenLogprob]]) -> None:
        self._values = values  # or what makes them, anew each time: it may be interrupted

    @cached_property
    def data(self) -> list[wire.TokenLogprob]:  # type: ignore[override]
        return [*(self._values() if callable(self._values) else self._values)]

    __copy__ = UserList.copy  # which needs no `data`

    def __reduce__(self) -> tuple[Any, ...]:
        return LateLogprobs, (self.data,)


class Detokenizer:
    """Owns the text state of every running request, by uid. late: those of output tokens stay packed in replies, for
    whoever calls `logprobs`."""

    def __init__(self, codec: HFTextCodec, *, late: bool = False) -> None:
        self._codec, self._late = codec, late
        self._echo = lru_cache(maxsize=1)(  # outputs of one prompt follow one another
            lambda prompt, skip_special: codec.decode(wire.unpack_ids(prompt), skip_special=skip_special)
        )
        self._streams: dict[int, _Stream] = {}

    def detokenize(self, message: wire.DetokenizeMsg) -> tuple[wire.UserReply | None, wire.AbortMsg | None]:
        """The reply to the client, and what the scheduler is to end because its text has a stop string.

        Exactly one reply has a finish reason. After a stop string, whatever the scheduler still sends for the uid is
        dropped, up to its own terminal message."""
        stream = self._streams.get(message.uid)
        if stream is None:
            if message.start is None and message.finish_reason is None:
                return None, None
            stream = self._streams[message.uid] = _Stream(self._codec, message.start)
        if message.finish_reason is not None:
            del self._streams[message.uid]
        if stream.stopped:
            return None, None
        reply = self._advance(stream, message)
        stream.stopped = reply.finish_reason is not None and message.finish_reason is None
        return reply, wire.AbortMsg(uid=message.uid) if stream.stopped else None

    def drop(self, uid: int) -> None:
        """Forget a stream whose message could not be handled: what still arrives for it is ignored."""
        if uid in self._streams:
            self._streams[uid].stopped = True

    def _advance(self, stream: _Stream, message: wire.DetokenizeMsg) -> wire.UserReply:
        start, finish_reason, ids, packed = message.start, message.finish_reason, message.token_ids, message.logprobs
        token_ids, num_prompt, (right, wrong) = wire.unpack_ids(ids), stream.start.num_prompt_tokens, message.drafted
        found, stream.num_cached = False, max(stream.num_cached, message.num_cached)
        if start is None and finish_reason is None and not stream.stop.stops:  # as nearly all are
            stream.num_output += len(token_ids)
            counts, text = (num_prompt, stream.num_output, stream.num_cached), stream.decoder.push(token_ids)
            logprobs = self._told(stream, ids, packed) if packed else ()
            return wire.UserReply(message.uid, text, ids, *counts, logprobs=logprobs, drafted=message.drafted)
        num_free = max(0, stream.start.min_tokens - stream.num_output)  # tokens too early for a stop string
        head = self._echo(start.prompt, start.skip_special) if start is not None and start.echo else ""
        shown = token_ids[: len(token_ids) - message.num_hidden] if message.num_hidden else token_ids
        for count, token in enumerate(shown, 1):  # what comes behind a stop string was never said
            delta = stream.decoder.push((token,))
            text, found = stream.stop.push(delta) if count > num_free else (delta, False)
            head += text
            if found:
                packed = packed[: len(packed) // len(token_ids) * count]
                right -= max(0, len(token_ids) - count - 1)  # the last token was in no draft
                ids = wire.pack_ids(token_ids := token_ids[:count])
                break
        if finish_reason is not None and not found:
            text, found = stream.stop.push(stream.decoder.flush())
            head += text
        stream.num_output += len(token_ids)
        if found and finish_reason in (None, FinishReason.STOP, FinishReason.LENGTH):
            finish_reason = FinishReason.STOP
        elif finish_reason is not None and not found:
            head += stream.stop.flush()
        counts, error = (num_prompt, stream.num_output, stream.num_cached), (message.error, message.error_status)
        logprobs = self._told(stream, ids, packed) if packed else ()
        of_prompt, prompt_end = self._prompt_logprobs(message), start and stream.decoder.context_text
        when = 0.0 if start is None and finish_reason is None else time.time()
        told = (*counts, finish_reason, *error, logprobs, of_prompt, prompt_end or "", stream.stop.found, when)
        return wire.UserReply(message.uid, head, ids, *told, message.pooled, (right, wrong))

    def _told(self, stream: _Stream, ids: bytes, packed: Logprobs) -> Any:
        return packed if self._late else tuple(self.logprobs(ids, packed, stream.start.skip_special))

    def logprobs(self, ids: bytes, packed: Logprobs, skips: bool) -> Iterator[wire.TokenLogprob]:
        """Of tokens, if any are packed for them. skips: special ones do not become text."""
        token_bytes, hidden = self._codec.token_bytes, self._codec.special_ids if skips else ()
        token_ids = wire.unpack_ids(ids) if packed else []
        for token, (logprob, top) in zip(token_ids, wire.unpack_logprobs(packed or b"", len(token_ids)), strict=True):
            most = [wire.TopLogprob(i, token_bytes(i), x) for i, x in top]
            yield wire.TokenLogprob(token, token_bytes(token), logprob, most, token not in hidden)

    def _prompt_logprobs(self, message: wire.DetokenizeMsg) -> tuple[wire.TokenLogprob, ...]:
        """Of the whole prompt, with the stream's first message: nothing precedes the first token."""
        start, packed, is_error = message.start, message.prompt_logprobs, message.finish_reason is FinishReason.ERROR
        if start is None or not start.prompt or is_error or (len(start.prompt) > 4 and not packed):
            return ()
        (first,) = self.logprobs(start.prompt[:4], wire.pack_ids([0]), start.skip_special)
        return (replace(first, logprob=None), *self.logprobs(start.prompt[4:], packed, start.skip_special))
