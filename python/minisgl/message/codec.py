"""Messages to bytes and back: msgpack through msgspec, a list of messages per frame. No pickle. And what a child
tells its supervisor, over the pipe that this has made for it."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from minisgl.core import SamplingParams

T = TypeVar("T")


def _tag(name: str) -> str:
    return re.sub("(Msg|Reply|Prompt)$", "", name).lower()


class Part(msgspec.Struct, frozen=True, tag=_tag, forbid_unknown_fields=True):
    """What messages are made of."""


class Message(Part, frozen=True):
    """About one request: the uid names it, and whoever asks for something that is not about a request draws one."""

    uid: int


class Request(Message, Generic[T], frozen=True):
    """A new request. Its outputs are so many as `count`: their uids follow on `uid`, and their seeds on `params.seed`.

    Raises: ValueError for uids that nobody of ours would name.
    """

    prompt: T
    params: SamplingParams
    count: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.uid < 2**62 and 0 <= self.count <= 4096):
            raise ValueError(f"uid {self.uid}, count {self.count}")

    @property
    def uids(self) -> range:
        return range(self.uid, self.uid + self.count)


class Codec(Generic[T]):
    """Encodes and decodes batches of one channel's message union.

    Raises: msgspec.ValidationError when the bytes are not a batch of this channel's messages.
    """

    def __init__(self, union: Any) -> None:
        self.encode: Callable[[Sequence[T]], bytes] = msgspec.msgpack.Encoder().encode
        self.decode: Callable[[bytes], list[T]] = msgspec.msgpack.Decoder(list[union]).decode


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 bytes, of this machine's order."""
    return array("i", token_ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    return memoryview(data).cast("i").tolist()


def carried(value: Any) -> bool:
    """Whether a JSON value has only numbers that messages can carry."""
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError) as error:
        return isinstance(error, UnicodeEncodeError)  # which is about no number
    return True


class Report(Part, frozen=True):
    """A child lives, says to its supervisor. ready: start-up is over. failure: why the process ends, in words that the
    operator can do something about where it is a `config` error."""

    ready: bool = False
    failure: str | None = None
    config: bool = False


encode_report: Callable[[Report], bytes] = msgspec.msgpack.Encoder().encode
decode_report: Callable[[bytes], Report] = msgspec.msgpack.Decoder(Report).decode
