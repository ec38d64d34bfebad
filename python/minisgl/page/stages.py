"""What happens to a request, and the code that does it in this version: for who clicks on a stage."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

import minisgl
from minisgl.trace.records import EVENTS, encode_json

PACKAGE = Path(__file__).parents[1]
Json = dict[str, Any]


@cache
def stages() -> list[Json]:
    """`EVENTS`, with the code. Raises: KeyError where it names what is not."""
    return [{**about, "name": name, "code": [*map(_code, about["code"])]} for name, about in EVENTS.items()]


def _code(place: str) -> Json:
    file, _, name = place.partition(":")
    text = (PACKAGE / file).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        node = {getattr(child, "name", ""): child for child in node.body}[part]
    lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
    return {"file": file, "name": name, "first": node.lineno, "last": node.end_lineno, "text": "".join(lines)}


def add_stages(app: FastAPI) -> None:
    @app.get("/trace/stages", name="stages")
    async def route() -> Response:
        """What happens to a request, and the code that does it in this version."""
        told = {"version": minisgl.__version__, "stages": stages()}
        return Response(encode_json(told), media_type="application/json")
