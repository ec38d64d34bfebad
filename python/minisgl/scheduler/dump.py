"""A file with all that a planner remembers, for `tools/replay.py`: written when that contradicts itself."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import msgspec
import numpy as np

from minisgl.env import cache_dir
from minisgl.kvcache.radix import PrefixCache, RadixNode


def dump(planner: object, reason: str) -> str:
    """The file's path, or why there is none. It has token ids of requests: nobody else can read it. Three are kept."""
    try:
        folder = cache_dir().parent / "dumps"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in sorted(folder.iterdir(), key=os.path.getmtime)[:-2]:
            old.unlink()
        handle, path = tempfile.mkstemp(".msgpack", "planner-", folder)
        with open(handle, "wb") as file:
            file.write(msgspec.msgpack.encode((reason, planner), enc_hook=_plain))
        return path
    except Exception as error:  # what contradicts itself may be in no order that can be written
        return f"none: {error}"


def _plain(value: Any) -> Any:
    """What msgspec does not know. Nodes are numbers, but where the cache has them all."""
    if isinstance(value, PrefixCache):
        nodes = value.nodes()
        return vars(value) | {"nodes": [[id(node), *(getattr(node, x) for x in node.__slots__)] for node in nodes]}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return id(value) if isinstance(value, RadixNode) else vars(value) if hasattr(value, "__dict__") else list(value)
