"""From a child process to its supervisor, over the pipe that the supervisor made for it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


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
