"""JSON for whoever reads it line by line."""

from __future__ import annotations

import json

import orjson

# JSON needs no escape for them, but many a reader of lines ends one there (Python's `str.splitlines`, JavaScript's).
_LINE_ENDS = (("\x85", b"\\u0085"), ("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"))


def dump_json(payload: object) -> bytes:
    """JSON on one line, whoever reads it."""
    try:
        data = orjson.dumps(payload)
    except TypeError:  # a client's number, which comes back, is too large for it
        data = json.dumps(payload).encode()
    if not data.isascii():
        for character, escaped in _LINE_ENDS:
            data = data.replace(character.encode(), escaped)
    return data
