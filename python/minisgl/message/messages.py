"""What processes tell each other: one tagged union of structs for each channel, and their bytes (msgpack by msgspec, a
list of messages per frame, no pickle). What a child tells its supervisor goes over a pipe."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from struct import Struct, iter_unpack
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from minisgl.core import FinishReason, Logprobs, SamplingParams

T = TypeVar("T")


class Part(msgspec.Struct, frozen=True, tag=str.lower, forbid_unknown_fields=True):
    """What messages are made of."""


class Message(Part, frozen=True):
    """About one request: the uid names it, and whoever asks for something that is not about a request draws one."""

    uid: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class Request(Message, Generic[T], frozen=True):
    """A new request, and how many outputs it has: their uids follow on `uid`, and their seeds on `params.seed`."""

    prompt: T
    params: SamplingParams
    count: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 1

    @property
    def uids(self) -> range:
        return range(self.uid, self.uid + self.count)


class Codec(Generic[T]):
    """Encodes and decodes batches of one channel's message union.

    Raises: msgspec.ValidationError when the bytes are not a batch of this channel's messages."""

    def __init__(self, union: Any) -> None:
        self.encode: Callable[[Sequence[T]], bytes] = msgspec.msgpack.Encoder().encode
        self.decode: Callable[[bytes], list[T]] = msgspec.msgpack.Decoder(list[union]).decode


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 bytes, of this machine's order."""
    return array("i", token_ids).tobytes()


pack_one: Callable[[int], bytes] = Struct("i").pack  # the same of one id


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    return memoryview(data).cast("i").tolist()


class Report(Part, frozen=True):
    """A child lives, says to its supervisor. ready: start-up is over. failure: why the process ends, in words that the
    operator can do something about where it is a `config` error."""

    ready: bool = False
    failure: str | None = None
    config: bool = False


report_codec: Codec[Report] = Codec(Report)


class UserMsg(Request[bytes], frozen=True):
    """A tokenized request, `prompt` its packed ids. `params.seed` and `params.max_tokens` are set; prompt + max_tokens
    fit the context. tokenized: when, in Unix seconds; 0: not known."""

    tokenized: float = 0.0

    def __post_init__(self) -> None:
        if len(self.prompt) % 4:
            raise ValueError("a part of an id")

    def without(self, uid: int) -> list["UserMsg"]:
        """The request but for one of its outputs: those before it, and those after it."""
        index = uid - self.uid
        later, count = self.params.of_choice(index + 1), self.count - index - 1
        parts = (self.uid, self.prompt, self.params, index), (uid + 1, self.prompt, later, count)
        return [UserMsg(*part, self.tokenized) for part in parts if part[-1]]


class AbortMsg(Message, frozen=True):
    """End a request. Unknown and finished uids are ignored: the abort lost a race."""


class ResumeMsg(Message, frozen=True):
    """From rank 0: the mask that a request sat steps out for is there. paced: it waits for the next one too."""

    paced: bool


class ForcedMsg(Message, frozen=True):
    """From rank 0: from this position of a request on, its grammar prescribes these tokens."""

    position: int
    token_ids: bytes


class PingMsg(Message, frozen=True):
    """A health check: through tokenizer, scheduler (then `back`) and detokenizer, also while a step is running."""

    back: bool = False


class StatsMsg(Message, frozen=True):
    """Asks rank 0 for its counts; answered by a `StatsReply`, also while a step is running."""


class FlushMsg(Message, frozen=True):
    """Forget the cached prefixes that no running request uses; answered by a `FlushReply`."""


class TraceMsg(Message, frozen=True):
    """Asks rank 0 for what it remembers of these requests, and of its steps from the one of this number on, of the last
    `num_steps` at most; answered by a `TraceReply`, also while a step is running.

    view: also of what it does now; 2: with the prefix cache and the pages. Whoever views may slow the scheduler down,
    until they view no more: by `delay` seconds before each step, or all the time."""

    uids: tuple[int, ...] = ()
    since: int = 0
    num_steps: int = 0
    view: int = 0
    delay: float = 0.0
    paused: bool = False


BackendMsg = UserMsg | AbortMsg | PingMsg | StatsMsg | FlushMsg | TraceMsg
backend_codec: Codec[BackendMsg] = Codec(BackendMsg)
RankMsg = UserMsg | AbortMsg | FlushMsg | ResumeMsg | ForcedMsg  # to all ranks alike


class RankBatch(Part, frozen=True):
    """What rank 0 tells the other ranks at each turn of its loop, by its number: what to apply before the next plan."""

    number: int
    messages: list[RankMsg]


rank_codec: Codec[RankBatch] = Codec(RankBatch)


LEAST = -9999.0  # for what is less, or no number: JSON has no infinities, and this is OpenAI's


class TopLogprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
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


def unpack_logprobs(packed: Logprobs, num: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of so many tokens: log-probability, and (id, log-probability) of the most probable ones; none below `LEAST`."""
    rows = iter_unpack("f" + "if" * (len(packed) // 8 // max(1, num)), packed)  # `max` keeps the first beside NaN
    return [(max(LEAST, x), [(i, max(LEAST, y)) for i, y in zip(top[::2], top[1::2], strict=True)]) for x, *top in rows]


class UserReply(Message, frozen=True, omit_defaults=True):
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
    detokenized: float = 0.0  # in the first and the last: when, in Unix seconds
    pooled: bytes = b""  # the vector of a request for one: little-endian float32
    drafted: tuple[int, int] = (0, 0)  # tokens of drafts: right, wrong


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


class Histogram(msgspec.Struct, forbid_unknown_fields=True):
    """`counts[i]`: values of at most `bounds[i]` and above the bound before; the last count has no bound."""

    bounds: tuple[float, ...]
    counts: list[int] = []
    total: float = 0.0  # all values added up

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class StatsReply(Message, frozen=True):
    """What rank 0 is doing, and what it has done since it started."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_used_pages: int  # by requests, as `Pages.num_used`
    num_retracted: int
    num_drafted: dict[str, int]  # tokens, by who has guessed them
    num_right: dict[str, int]  # of these
    step_requests: Histogram  # per step
    step_tokens: Histogram


class FlushReply(Message, frozen=True):
    """The prefix cache was flushed; so many pages were freed."""

    num_pages: int


class TraceReply(Message, frozen=True):
    """What a `TraceMsg` asked for: a `Recorded` of the trace's records."""

    data: bytes


OneReply = EncodedReply | DecodedReply | StatsReply | FlushReply | TraceReply  # to a question of the API server
FrontendMsg = UserReply | AcceptedReply | ErrorReply | PingMsg | OneReply
frontend_codec: Codec[FrontendMsg] = Codec(FrontendMsg)


PROMPT_TAIL = 16  # prompt ids that say how the prompt ends: more than a tag and whitespace, spelled out, have


class ChatPrompt(Part, frozen=True):
    """Messages for the chat template, as the template expects them (OpenAI's shape).

    add_generation_prompt: the prompt ends where an assistant begins to speak. continue_final: instead it ends in the
    middle of the last message, which is an assistant's and goes on."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False


class TextPrompt(Part, frozen=True):
    """Plain text: encoded with the tokenizer's own special tokens (BOS, where the model has one)."""

    text: str
    most: int = 0  # tokens that are kept, the first ones; 0: all


class IdsPrompt(Part, frozen=True):
    """Token ids, packed; used as they are."""

    input_ids: bytes


Prompt = ChatPrompt | TextPrompt | IdsPrompt


class TokenizeMsg(Request[Prompt], frozen=True):
    """A new request. `params.max_tokens` may be None (the tokenizer fills in what the context has room for).

    notify: answer with an `AcceptedReply`, unless the scheduler may still refuse the request for its grammar."""

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


class DetokenizeMsg(Message, frozen=True, omit_defaults=True):
    """New output tokens of a request. The last message has `finish_reason`, with `error` text if it is `error`.

    An end-of-sequence token that ended the request is part of `token_ids`; `num_hidden` of the last ids (0 or 1) are
    such and never become text."""

    token_ids: bytes
    num_cached: int = 0
    num_hidden: int = 0
    start: StreamStart | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_status: int = 500
    logprobs: Logprobs = b""  # of `token_ids`
    prompt_logprobs: Logprobs = b""  # of all prompt ids but the first
    pooled: bytes = b""
    drafted: tuple[int, int] = (0, 0)


TextMsg = TokenizeMsg | EncodeMsg | DecodeMsg
# An error reply is of the scheduler's, to a request that it does not take; the detokenizer passes it on. A flush is
# of a scheduler that begins: nothing more comes for any uid that the detokenizer knows.
TokenizerMsg = TextMsg | DetokenizeMsg | AbortMsg | PingMsg | ErrorReply | FlushMsg
tokenizer_codec: Codec[TokenizerMsg] = Codec(TokenizerMsg)
