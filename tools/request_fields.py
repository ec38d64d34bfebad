"""Writes docs/requests.md: what becomes of each field of a request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from minisgl.server.bodies.chat import ChatBody, CompletionBody
from minisgl.server.bodies.fields import NO_EFFECT, OBJECTS, OTHER_NAMES, UNSUPPORTED, Fields, fields_of
from minisgl.server.bodies.messages import MessagesBody
from minisgl.server.bodies.native import AbortBody, DetokenizeBody, GenerateBody, TokenizeBody
from minisgl.server.bodies.responses import ResponsesBody
from minisgl.server.routes.vectors import EmbeddingsBody, RerankBody, ScoreBody

_VECTORS = (EmbeddingsBody, RerankBody, ScoreBody)
_GENERATE = (ChatBody, CompletionBody, GenerateBody, ResponsesBody, MessagesBody)
# What requests may have.
ALL_BODIES = {model: fields_of(model) for model in (*_GENERATE, *_VECTORS, TokenizeBody, DetokenizeBody, AbortBody)}

TARGET = Path(__file__).parent.parent / "docs" / "requests.md"
HEAD = """# Fields of requests

Made by `python tools/request_fields.py` of the models of the bodies and of `server/bodies/fields.yaml`; do not edit.

A field is *known*: something is made of it. Or it would change the answer and is *not supported*: it is refused with a
400 that names it, unless its value asks for nothing. Every other field is *ignored*, whether anybody knows it or not:
the answer's header `x-minisgl-ignored` lists it, and the log tells it once. With `--strict-requests`, what is in no
list here is refused. `null` is the same as leaving a field out.
"""


def names(found: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(found)) or "none"


def neutral(values: Sequence[object]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values) or "none but `null`"


def refused(fields: dict[str, Sequence[object]]) -> list[str]:
    """A table with a line for each set of neutral values."""
    groups: dict[str, list[str]] = {}
    for name, values in fields.items():
        groups.setdefault(neutral(values), []).append(name)
    return [
        "| field | values that ask for nothing |",
        "|---|---|",
        *(f"| {names(f)} | {v} |" for v, f in groups.items()),
    ]


def section(title: str, fields: Fields, common: dict[str, Sequence[object]]) -> list[str]:
    lines = [f"### {title}", "", f"Known: {names(fields.known)}."]
    own = {name: unless for name, unless in fields.refused.items() if common.get(name) != unless}
    if own:
        lines += ["", f"Not supported{', beside those of all bodies' if common else ''}:", "", *refused(own)]
    if fields.ignored and not common:
        lines += ["", f"Ignored, also by strict servers: {names(fields.ignored)}."]
    return [*lines, ""]


def document() -> str:
    common: dict[str, Sequence[object]] = dict(UNSUPPORTED)
    lines = [HEAD, "## Not supported, in all bodies that do not know them", "", *refused(common), ""]
    lines += [
        "## Ignored, also by strict servers",
        "",
        f"{names(NO_EFFECT)}.",
        "",
        "## Other names for known fields",
        "",
    ]
    lines += ["| field | is |", "|---|---|", *(f"| `{name}` | `{meant}` |" for name, meant in OTHER_NAMES.items()), ""]
    lines += ["## Bodies", ""]
    for model, fields in ALL_BODIES.items():
        title = (model.__doc__ or model.__name__).split("\n")[0].split(":")[0].rstrip(".")
        lines += section(title, fields, common)
    lines += ["## Objects within bodies", ""]
    for name, fields in OBJECTS.items():
        if fields.known:
            lines += section(name, fields, {})
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
