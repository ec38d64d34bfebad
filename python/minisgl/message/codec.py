"""Messages to bytes and back: msgpack through msgspec, a list of messages per frame. No pickle. And what a child
tells its supervisor, over the pipe that this has made for it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes batches of one channel's message union.

    Raises: msgspec.ValidationError when the bytes are not a batch of this channel's messages.
    """

    def __init__(self, union: Any) -> None:
        self.encode: Callable[[Sequence[T]], bytes] = msgspec.msgpack.Encoder().encode
        self.decode: Callable[[bytes], list[T]] = msgspec.msgpack.Decoder(list[union]).decode


def check_uids(uid: int, count: int) -> None:
    """Raises: ValueError for so many uids from this one on that nobody of ours would name."""
    if not (0 <= uid < 2**62 and 0 <= count <= 4096):
        raise ValueError(f"uid {uid}, count {count}")


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 bytes, of this machine's order."""
    return array("i", token_ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    return memoryview(data).cast("i").tolist()


def carried(value: Any) -> bool:
    """Whether a JSON value has only numbers that messages can carry."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, int) and not -(2**63) <= item < 2**64:
            return False
    return True


class Ready(msgspec.Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """Start-up is over."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", forbid_unknown_fields=True):
    """The main loop is alive."""


class Failed(msgspec.Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    """The process ends because of this. `config`: the operator can mend it."""

    message: str
    config: bool


ControlMsg = Ready | Heartbeat | Failed
encode_control: Callable[[ControlMsg], bytes] = msgspec.msgpack.Encoder().encode
decode_control: Callable[[bytes], ControlMsg] = msgspec.msgpack.Decoder(ControlMsg).decode
