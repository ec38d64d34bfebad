"""Calls that the client demands (`tool_choice` `required`, or a function by name): what the output must look like, for
a grammar to hold the model to, and the parser of such output."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisgl.parser.calls import BracketScanner, json_calls
from minisgl.parser.parts import CallPart, Part, TextPart

_LITERAL_KEYS = ("const", "default", "enum", "examples")  # of JSON schemas: their values are data, not schemas


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """What an output of calls looks like: JSON that matches `schema`, between `prefix` and `suffix`; all that once or
    more where there is a `separator`. Its parser is `registry.make_forced_parser`."""

    schema: dict[str, Any]
    prefix: str = ""
    suffix: str = ""
    separator: str | None = None


def forced_call(
    parser: str | None, tools: Sequence[Mapping[str, Any]], function: str | None, *, parallel: bool
) -> ForcedCall:
    """Calls in the model's own format where that is JSON, which is what it knows best; else plain JSON.

    parser: the name of the format, as for `--tool-call-parser`; None: unknown.
    tools: as in the request (`{"type": "function", "function": {…}}`).
    function: the name of the one to call; None: any.
    parallel: there may be several calls, unless one function is named: that is one call.
    """
    parallel = parallel and function is None
    functions = [tool["function"] for tool in tools if function in (None, tool["function"]["name"])]
    if parser in ("hermes", "qwen"):
        separator = "\n" if parallel else None
        return ForcedCall(_call(functions, "arguments", "#"), "<tool_call>\n", "\n</tool_call>", separator)
    if parser == "llama3_json":
        return ForcedCall(_call(functions, "parameters", "#"), separator="; " if parallel else None)
    if parser == "mistral":
        return ForcedCall(_calls(functions, parallel), prefix="[TOOL_CALLS] ")
    if function is not None:
        return ForcedCall(_parameters(functions[0], "#"))
    return ForcedCall(_calls(functions, parallel))


def _calls(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls, one at least, and one only unless `parallel`."""
    schema = {"type": "array", "minItems": 1, "items": _call(functions, "arguments", "#/items")}
    return schema if parallel else {**schema, "maxItems": 1}


def _call(functions: Sequence[Mapping[str, Any]], arguments: str, root: str) -> dict[str, Any]:
    """The schema, standing at `root`, of an object with `name` and `arguments` (as the format calls them)."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    arguments: _parameters(function, f"{root}/anyOf/{index}/properties/{arguments}"),
                },
                "required": ["name", arguments],
                "additionalProperties": False,
            }
            for index, function in enumerate(functions)
        ]
    }


def _parameters(function: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The schema of a function's arguments when it stands at `root` of a larger one: always of an object."""
    schema = _moved(function.get("parameters") or {}, root)
    assert isinstance(schema, dict)
    return schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}


def _moved(schema: Any, root: str) -> Any:
    """The schema with the references that start at its own root made to start at `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: value if key in _LITERAL_KEYS else _moved(value, root) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved


class PlainParser:
    """Forced calls in plain JSON. The arguments of a named function come as they are written; of others, call by call.
    Output that was cut off before its end: of a named function, the arguments so far; else it is text."""

    def __init__(self, names: Collection[str], name: str | None) -> None:
        self._names = names
        self._name = name  # of the one function; the output is its arguments
        self._buffer = ""
        self._started = False
        self._scanner = BracketScanner()
        self._num_calls = 0

    def push(self, text: str) -> list[Part]:
        if self._name is not None:
            return self._arguments(text)
        self._buffer += text
        parts: list[Part] = []
        while (call := self._next_call()) is not None:
            parts.append(call)
        return parts

    def finish(self) -> list[Part]:
        rest, self._buffer = self._buffer, ""
        return [TextPart(rest)] if rest.strip(" \t\r\n[],") else []

    def _arguments(self, text: str) -> list[Part]:
        if not self._started:
            text = text.lstrip()
            if not text:
                return []
        name = None if self._started else self._name
        self._started = True
        return [CallPart(0, name, text)] if text else []

    def _next_call(self) -> CallPart | None:
        """The next element of the list, once it is whole."""
        start = len(self._buffer) - len(self._buffer.lstrip(" \t\r\n[,"))
        if start:
            self._buffer = self._buffer[start:]
            self._scanner = BracketScanner()
        if not self._buffer.startswith("{"):
            return None
        end = self._scanner.scan(self._buffer)
        calls = None if end is None else json_calls(self._buffer[:end], self._names)
        if not calls:
            return None
        self._buffer, self._scanner = self._buffer[end:], BracketScanner()
        self._num_calls += 1
        return CallPart(self._num_calls - 1, calls[0].name, calls[0].arguments)
