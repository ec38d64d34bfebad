"""The contents of a tool call, as models write it, and how far it reaches."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple, NoReturn

MAX_DEPTH = 64  # of brackets in Python literals: enough for arguments, and no work for Python's parser


class Call(NamedTuple):
    """A call of a function that the client has. `arguments` is a JSON object."""

    name: str
    arguments: str


def json_calls(text: str, names: Collection[str]) -> list[Call] | None:
    """Calls as JSON: `{"name": …, "arguments" (or "parameters"): {…}}`, or a list of such. None: it is something else.

    Line breaks within strings are taken, though JSON has them escaped: small models write code that way.
    """
    try:
        value = _load(text)
        calls = [_json_call(item, names) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None
    return calls or None


def named_call(name: str, arguments: str, names: Collection[str]) -> list[Call] | None:
    """A call whose name stands before its arguments. None: it is no call."""
    try:
        return [_json_call({"name": name, "arguments": _load(arguments)}, names)]
    except (ValueError, RecursionError):
        return None


def python_calls(text: str, names: Collection[str]) -> list[Call] | None:
    """Calls as a Python list: `[f(a=1), g(b="x")]`, keyword arguments only, all of them literals. None: not that."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd escape sequences
            tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        calls = [_python_call(node, names) for node in tree.elts]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return calls or None


def _load(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, strict=False, parse_constant=refuse)


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair can be escaped in JSON, but not sent as UTF-8
        text = json.dumps(value)
    return text


def _json_call(value: Any, names: Collection[str]) -> Call:
    """Raises: ValueError when it is no call of one of these functions."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        raise ValueError("no call of a known function")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _load(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return Call(name, _dump(arguments))


def _python_call(node: ast.expr, names: Collection[str]) -> Call:
    """Raises: ValueError or TypeError when it is no call of one of these functions."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with keyword arguments")
    name = ast.unparse(node.func)
    if name not in names:
        raise ValueError("no call of a known function")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("** and repeated keywords are no arguments")
        arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
    return Call(name, _dump(arguments))


class _JsonNames(ast.NodeTransformer):
    """`true`, `false` and `null`, which models write in Python too."""

    _VALUES = {"true": True, "false": False, "null": None}  # noqa: RUF012

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._VALUES[node.id]) if node.id in self._VALUES else node


class BracketScanner:
    """Finds where a bracketed value ends, reading each character once. Brackets within strings do not count.

    quotes: the characters that delimit strings.
    """

    __slots__ = ("_depth", "_end", "_escaped", "_position", "_quote", "_quotes", "too_deep")

    def __init__(self, position: int = 0, quotes: str = '"') -> None:
        self._position = position  # of the next character to read
        self._quotes = quotes
        self._quote = ""  # of the string that is open
        self._escaped = False
        self._depth = 0
        self._end: int | None = None
        self.too_deep = False

    def scan(self, text: str) -> int | None:
        """The end of the value, exclusive, in `text`: the same text as before, and more. None: it goes on."""
        for position in range(self._position, len(text) if self._end is None else 0):
            character = text[position]
            if self._escaped:
                self._escaped = False
            elif self._quote:
                if character == "\\":
                    self._escaped = True
                elif character == self._quote:
                    self._quote = ""
            elif character in self._quotes and self._depth:
                self._quote = character
            elif character in "([{":
                self._depth += 1
                self.too_deep |= self._depth > MAX_DEPTH
            elif character in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    self._end = position + 1
                    break
        self._position = len(text)
        return self._end

    def in_string_at(self, text: str, position: int) -> bool:
        """Whether `position` of `text` is within a string of the value."""
        self.scan(text[:position])
        return bool(self._quote)
