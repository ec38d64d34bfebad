"""What a router reads of a request: the text of its prompt, and whose and of which session it is; and the metrics of
all replicas as one page."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson
from starlette.datastructures import Headers

from minisgl.cluster.router import Prompt, text_blocks

# What comes before a prompt's end, in this order, in one dialect or another.
_FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt", "text", "input_ids", "query", "documents")
_TOKENS = re.compile(rb'"(?:prompt|input)_tokens": ?(\d+)')
_STORED = re.compile(r"/v1/responses/([^/]+)|/trace/([^/]+)")
SESSION = "x-session-id"
_SAMPLE = re.compile(r"^([^\s{#]+)(?:\{(.*)\})?( .*)$")
_END = "# EOF"  # of OpenMetrics


def read_request(path: str, headers: Headers, body: bytes) -> Prompt:
    """Whatever the body is: what makes no sense has no text, and the server says so."""
    if (found := _STORED.match(path)) is not None:
        return Prompt((), 0, keeper=found[1] or found[2])
    fields: dict[str, Any] = {}
    if body.lstrip()[:1] == b"{":
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            fields = msgspec.json.decode(body, type=dict[str, Any])
    text = b"".join(_text(fields[name]) for name in _FIELDS if fields.get(name))
    salt = f"{headers.get('authorization')} {headers.get('x-api-key')} {fields.get('cache_salt')}"
    session = headers.get(SESSION) or fields.get("prompt_cache_key") or ""
    keeper = fields.get("previous_response_id") or ""
    names = (name if isinstance(name, str) else "" for name in (session, keeper))
    return Prompt(text_blocks(text, salt), len(text), *names)


def num_tokens(tail: bytes) -> int:
    """Of the prompt, by the end of an answer; 0 where that does not tell."""
    found = _TOKENS.findall(tail)
    return int(found[-1]) if found else 0


def _text(value: object) -> bytes:
    """Texts as they are; others as JSON without its last bracket, since a longer list begins with that of a shorter."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    try:
        return orjson.dumps(value)[:-1]
    except TypeError:  # a lone surrogate, a number beyond 64 bits
        return repr(value).encode()


def merged(pages: Mapping[str, str]) -> str:
    """One exposition of several, by the replicas' names: each family once, its samples with a label `replica`."""
    families: dict[str, tuple[list[str], list[str]]] = {}  # by name: what is said of it, and its samples
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# ") and line != _END:
                family = line.split(" ", 3)[2]
                about = families.setdefault(family, ([], []))[0]
                if line not in about:
                    about.append(line)
            elif (found := _SAMPLE.match(line)) is not None:
                labels = ",".join(filter(None, (found[2], f'replica="{replica}"')))
                families.setdefault(family, ([], []))[1].append(f"{found[1]}{{{labels}}}{found[3]}")
    lines = [line for about, samples in families.values() for line in (*about, *samples)]
    ends = [_END] * any(page.rstrip().endswith(_END) for page in pages.values())
    return "\n".join([*lines, *ends, ""])
