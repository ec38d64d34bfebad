"""What is in a frame: the type and the uid of each message."""

import msgspec


def read_frame(frame: bytes) -> list[tuple[str, int]]:
    return [(message["type"], message["uid"]) for message in msgspec.msgpack.decode(frame)]
