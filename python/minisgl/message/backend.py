"""To the scheduler: from tokenizers (new requests, aborts, pings), from the detokenizer (stop string found), and from
the API server (what is not about one request)."""

from __future__ import annotations

import msgspec

from minisgl.core import SamplingParams
from minisgl.message.codec import Codec, check_uids


class UserMsg(msgspec.Struct, frozen=True, tag="user", forbid_unknown_fields=True):
    """A tokenized request. `params.seed` and `params.max_tokens` are set; prompt + max_tokens fit the context.

    count: as in `TokenizeMsg`.
    """

    uid: int
    input_ids: bytes
    params: SamplingParams
    count: int = 1

    def __post_init__(self) -> None:
        check_uids(self.uid, self.count)
        if len(self.input_ids) % 4:
            raise ValueError("a part of an id")

    @property
    def uids(self) -> range:
        return range(self.uid, self.uid + self.count)

    def without(self, uid: int) -> list[UserMsg]:
        """The same but for one of its outputs: those before it, and those after it."""
        index = uid - self.uid
        later = self.params.of_choice(index + 1)
        parts = (
            UserMsg(self.uid, self.input_ids, self.params, index),
            UserMsg(uid + 1, self.input_ids, later, self.count - index - 1),
        )
        return [part for part in parts if part.count]


class AbortMsg(msgspec.Struct, frozen=True, tag="abort", forbid_unknown_fields=True):
    """End a request. Unknown and finished uids are ignored: the abort lost a race."""

    uid: int


class ResumeMsg(msgspec.Struct, frozen=True, tag="resume", forbid_unknown_fields=True):
    """From rank 0: the bitmask that a request sat steps out for is there. paced: it waits for the next one too."""

    uid: int
    paced: bool


class PingMsg(msgspec.Struct, frozen=True, tag="ping", forbid_unknown_fields=True):
    """A health check: passed on to the detokenizer at once, also while a step is running."""

    uid: int


class StatsMsg(msgspec.Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    """Asks rank 0 for its counts; answered by a `StatsReply`, also while a step is running."""

    uid: int


class FlushMsg(msgspec.Struct, frozen=True, tag="flush", forbid_unknown_fields=True):
    """Forget the cached prefixes that no running request uses; answered by a `FlushReply`."""

    uid: int


BackendMsg = UserMsg | AbortMsg | PingMsg | StatsMsg | FlushMsg
backend_codec: Codec[BackendMsg] = Codec(BackendMsg)


class RankBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rank 0 tells the other ranks at each turn of its loop: the messages to apply before the next plan.

    `number` counts the turns; `digest` is a checksum of rank 0's last plan (0 when not checked).
    """

    number: int
    messages: list[UserMsg | AbortMsg | FlushMsg | ResumeMsg]
    digest: int = 0


rank_codec: Codec[RankBatch] = Codec(RankBatch)
