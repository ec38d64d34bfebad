"""What a router reads of a request: the text of its prompt, and whose and of which session it is; and the metrics of
all replicas as one page."""

import re
from collections.abc import Mapping

import msgspec
from starlette.datastructures import Headers

from minisgl.cluster.router import Prompt, text_blocks

# What comes before a prompt's end, in this order, in one dialect or another.
_FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt", "text", "input_ids", "query", "documents")
_TOKENS = re.compile(rb'"(?:prompt|input)_tokens": ?(\d+)')
_STORED = re.compile(r"/(?:v1/responses|trace)/([^/]+)")
SESSION = "x-session-id"
_MAX_NAME = 1024  # characters of a session's
_NAMES = ("cache_salt", "prompt_cache_key", "previous_response_id")
_RAW = [(name, msgspec.Raw, msgspec.Raw()) for name in _FIELDS]
_Fields = msgspec.defstruct("_Fields", [*_RAW, *((name, str | None, None) for name in _NAMES)])
_decode = msgspec.json.Decoder(_Fields).decode  # passes over all else, and over what prompts are made of
_SAMPLE = re.compile(r"^([^\s{#]+)(?:\{(.*)\})?( .*)$")
_END = "# EOF"  # of OpenMetrics


def read_request(path: str, headers: Headers, body: bytes) -> Prompt:
    """Whatever the body is: what makes no sense has no text, and the server says so. x-replica: who is to be asked."""
    if (found := _STORED.match(path)) is not None or "x-replica" in headers:
        return Prompt((), 0, keeper=headers.get("x-replica") or (found[1] if found else ""))
    try:
        fields = msgspec.structs.asdict(_decode(body))
    except (msgspec.DecodeError, RecursionError):
        fields = msgspec.structs.asdict(_Fields())
    # As JSON without its last bracket or quote: a longer list or text begins with that of a shorter one.
    text = b"".join(memoryview(fields[name])[:-1] for name in _FIELDS)
    salt = f"{headers.get('authorization')} {headers.get('x-api-key')} {fields['cache_salt']}"
    names = (headers.get(SESSION) or fields["prompt_cache_key"] or "", fields["previous_response_id"] or "")
    return Prompt(text_blocks(text, salt), len(text), *(name if len(name) <= _MAX_NAME else "" for name in names))


def num_tokens(tail: bytes) -> int:
    """Of the prompt, by the end of an answer; 0 where that does not tell."""
    found = _TOKENS.findall(tail)
    return int(found[-1]) if found else 0


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
