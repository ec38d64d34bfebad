"""To the scheduler: from tokenizers (new requests, aborts, pings), from the detokenizer (stop string found), and from
the API server (what is not about one request)."""

from __future__ import annotations

from minisgl.message.codec import Codec, Message, Part, Request


class UserMsg(Request[bytes], frozen=True):
    """A tokenized request, `prompt` its packed ids. `params.seed` and `params.max_tokens` are set; prompt + max_tokens
    fit the context."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.prompt) % 4:
            raise ValueError("a part of an id")

    def without(self, uid: int) -> list[UserMsg]:
        """The request but for one of its outputs: those before it, and those after it."""
        index = uid - self.uid
        later = UserMsg(uid + 1, self.prompt, self.params.of_choice(index + 1), self.count - index - 1)
        return [part for part in (UserMsg(self.uid, self.prompt, self.params, index), later) if part.count]


class AbortMsg(Message, frozen=True):
    """End a request. Unknown and finished uids are ignored: the abort lost a race."""


class ResumeMsg(Message, frozen=True):
    """From rank 0: the mask that a request sat steps out for is there. paced: it waits for the next one too."""

    paced: bool


class PingMsg(Message, frozen=True):
    """A health check: it goes through tokenizer, scheduler and detokenizer back to the API server, also while a step is
    running. back: the scheduler has seen it."""

    back: bool = False


class StatsMsg(Message, frozen=True):
    """Asks rank 0 for its counts; answered by a `StatsReply`, also while a step is running."""


class FlushMsg(Message, frozen=True):
    """Forget the cached prefixes that no running request uses; answered by a `FlushReply`."""


BackendMsg = UserMsg | AbortMsg | PingMsg | StatsMsg | FlushMsg
backend_codec: Codec[BackendMsg] = Codec(BackendMsg)
RankMsg = UserMsg | AbortMsg | FlushMsg | ResumeMsg  # to all ranks alike


class RankBatch(Part, frozen=True):
    """What rank 0 tells the other ranks at each turn of its loop: the messages to apply before the next plan.

    `number` counts the turns; `digest` is a checksum of rank 0's last plan (0 when not checked).
    """

    number: int
    messages: list[RankMsg]
    digest: int = 0


rank_codec: Codec[RankBatch] = Codec(RankBatch)
