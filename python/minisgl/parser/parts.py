"""Parts of a message, as parsers make them of a model's text; the parser of its reasoning, and readers of calls."""

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from minisgl.config.chat import reasoning_after
from minisgl.grammar.schema import KINDS, json_kinds, resolved

MAX_DEPTH = 64  # of brackets in Python literals: enough for arguments, and no work for Python's parser
_PYTHON = {"True": "true", "False": "false", "None": "null"}
# Names of arguments that can be read where they stand without quotes, by the language of calls.
_WORD = r"""[\w$@](?:[^\s()[\]{},="']*[^\s()[\]{},="':+-])?"""
_KEY = r"""[^][{}",:\s](?:[^][{}",:]*[^][{}",:\s])?"""
BARE = {"tags": r"[^<>\n]*", "names": _KEY, "python": _WORD, "lines": _WORD}
_NAMED = re.compile(rf'<\|"\|>(.*?)<\|"\|>|"(?:[^"\\]|\\.)*"|(?<=[{{,])\s*({_KEY})\s*(?=:)', re.S)
# In calls as Python has them: strings, or names of functions and arguments, which need not be any for Python.
_STRING = r'''"""(?:\\.|[^\\])*?"""|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?'''
_NAMES = re.compile(rf"""({_STRING})|(?<![^\s()[\]{{}},="'])({_WORD})(?=\s*[=(])""", re.DOTALL)
_TEXT = {"string"}  # the types of a value of which each part can be passed on


class Part(NamedTuple):
    """More of a message: of the answer itself, of what the model thinks before it, or of a tool call.

    text: of a call its arguments, JSON. name: of the function, in a call's first part. call_index: counts the calls.
    """

    kind: Literal["text", "reasoning", "call"]
    text: str
    name: str | None = None
    call_index: int = 0


class Parser:
    """One message's parser. The parts, put together, do not depend on how the text was cut. Nothing raises.

    By itself, it makes plain text of all.
    """

    def __init__(self) -> None:
        self._buffer = ""  # what is not certain yet

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this text and were not before."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """The parts that waited for more, at the end of the text."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Part]:  # noqa: ARG002
        """What can be said of the buffer, and is taken off it. final: no more text follows."""
        text, self._buffer = self._buffer, ""
        return [Part("text", text)] if text else []


def num_certain(text: str, markers: Sequence[str]) -> int:
    """Characters of `text` that stay what they are whatever follows: its end may be the beginning of a marker, and
    whitespace before a marker belongs to it."""
    starts = range(max(0, len(text) - max(map(len, markers), default=1) + 1), len(text))
    end = next((start for start in starts if any(marker.startswith(text[start:]) for marker in markers)), len(text))
    return len(text[:end].rstrip())


class ThinkParser(Parser):
    """`<think>reasoning</think>answer`, or with other tags; the first may stand at the end of the prompt instead.

    Whitespace around reasoning and before the answer is formatting, and dropped. A text that ends while the model still
    thinks is reasoning as a whole.

    reasoning: whether the model reasons, and the tags, as in `core.Grammar`. prompt_end: the text with which the prompt
    ends. answer: the parser of what comes after the reasoning.
    """

    def __init__(self, reasoning: str, prompt_end: str, answer: Parser | None = None) -> None:
        super().__init__()
        self._answer = answer or Parser()
        reasoning = reasoning and reasoning_after(prompt_end, reasoning)
        when, self._opening, self._closing = reasoning.split() if reasoning else ("", "", "")
        self._without_tag = when == "always"
        self._is_known = not reasoning  # whether the text begins with reasoning
        self._is_leading = False  # whitespace that comes next is formatting
        self.is_thinking = False  # the reasoning has begun, and goes on as far as can be seen

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        if not self._is_known:
            text = self._buffer.lstrip()
            has_tag = text.startswith(self._opening)
            if self._opening.startswith(text) and not (has_tag or final):
                return []
            self._buffer = text.removeprefix(self._opening) if has_tag else self._buffer
            self._is_known, self.is_thinking = True, has_tag or self._without_tag
            self._is_leading = self.is_thinking
        if self.is_thinking:
            self._strip()
            text, closing, rest = self._buffer.partition(self._closing)
            size = len(text.rstrip()) if closing or final else num_certain(text, (self._closing,))
            parts += [Part("reasoning", text[:size])] if size else []
            self._buffer = rest if closing else text[size:]
            if closing:
                self.is_thinking, self._is_leading = False, True
        if not self.is_thinking:
            self._strip()
            text, self._buffer = self._buffer, ""
            parts += self._answer.push(text) if text else []
        return parts + (self._answer.finish() if final else [])

    def _strip(self) -> None:
        if self._is_leading:
            self._buffer = self._buffer.lstrip()
            self._is_leading = not self._buffer


def calls_in(text: str, names: Collection[str], language: str = "json") -> list[Part] | None:
    """Calls of functions that the client has, whose arguments are objects. None: the text is something else.

    language: "json": `{"name": …, "arguments" (or "parameters"): {…}}`, or a list of such; "python": a list of calls,
    `[f(a=1), g(b="x")]`, with keyword arguments only, all of them literals; "lines": such calls, one after the other;
    "names": one, `call:f{a:1}`, as JSON but for names without quotes, and strings, between `<|"|>`.
    """
    try:
        by_language = {"json": _json_value, "names": _named_value}
        value = by_language[language](text) if language in by_language else _python_value(text, language == "python")
        return [_call(item, names) for item in (value if isinstance(value, list) else [value])] or None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _json_value(text: str) -> Any:
    """Line breaks within strings are taken, though JSON has them escaped: small models write code that way."""
    return json.loads(text, strict=False, parse_constant=int)  # which raises ValueError for NaN and the like


def _named_value(text: str) -> dict[str, Any]:
    """As the object that a call in JSON is: what stands between tokens gets quotes, and names."""
    name, bracket, rest = text.strip().removeprefix("call:").partition("{")
    made = _NAMED.sub(lambda it: it[0] if it[0][0] == '"' else json.dumps(it[1] or it[2] or ""), bracket + rest)
    return {"name": name, "arguments": _json_value(made)}


def _python_value(text: str, in_list: bool) -> list[dict[str, Any]]:
    """Calls in Python as they are in JSON: those of a list, or statements; none if it is no list.

    Raises: ValueError or TypeError when one of them is no call.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of odd escape sequences
        plain = _NAMES.sub(lambda found: found[1] or f"_{found[2].encode().hex()}", text.strip())
        body: list[Any] = ast.parse(plain).body
    nodes = [statement.value if isinstance(statement, ast.Expr) else statement for statement in body]
    calls = []
    if in_list:
        nodes = nodes[0].elts if len(nodes) == 1 and isinstance(nodes[0], ast.List) else []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
            raise ValueError("no call with keyword arguments")
        arguments = {}
        for keyword in node.keywords:
            name = bytes.fromhex((keyword.arg or "")[1:]).decode()
            if not name or name in arguments:
                raise ValueError("** and repeated keywords are no arguments")
            arguments[name] = ast.literal_eval(_JsonNames().visit(keyword.value))
        calls.append({"name": bytes.fromhex(node.func.id[1:]).decode(), "arguments": arguments})
    return calls


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text  # half of a pair cannot be sent as UTF-8


def _call(value: Any, names: Collection[str]) -> Part:
    """Raises: ValueError when it is no call of one of these functions."""
    fields = value if isinstance(value, dict) else {}
    fields = fields["function"] if isinstance(fields.get("function"), dict) else fields
    if not isinstance(name := fields.get("name"), str) or name not in names:
        raise ValueError("no call of a known function")
    arguments = fields.get("arguments", fields.get("parameters"))
    arguments = _json_value(arguments.strip() or "{}") if isinstance(arguments, str) else arguments
    if not isinstance(arguments := {} if arguments is None else arguments, dict):
        raise ValueError("arguments are an object")
    return Part("call", _dump(arguments), name)


class _JsonNames(ast.NodeTransformer):
    """`true`, `false` and `null`, which models write in Python too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(json.loads(node.id)) if node.id in _PYTHON.values() else node


class BracketReader:
    """Passes a bracketed value on as it comes, to its end. Brackets within strings do not count, and line breaks
    in them, which models leave as they are, are escaped; nothing else is changed or checked.

    quotes: the characters that delimit strings.
    """

    def __init__(self, quotes: str = '"') -> None:
        self._quotes = quotes
        self._quote, self._escaped = "", False  # of the string that is open
        self._depth, self.too_deep = 0, False

    def read(self, text: str, *, final: bool = False) -> tuple[int, str, bool]:  # noqa: ARG002
        """How many characters of the text belong to the value, what they are, and whether it ends with them."""
        read: list[str] = []
        for character in text:
            if self._quote:
                self._quote = "" if character == self._quote and not self._escaped else self._quote
                self._escaped = character == "\\" and not self._escaped
            elif character in self._quotes:
                self._quote = character
            elif character in "([{":
                self._depth += 1
                self.too_deep |= self._depth > MAX_DEPTH
            elif character in ")]}":
                self._depth -= 1
            read.append(json.dumps(character)[1:-1] if self._quote and character < " " else character)
            if self._depth <= 0:
                return len(read), "".join(read), True
        return len(read), "".join(read), False


def typed_value(text: str, kinds: set[str]) -> str:
    """What is written without quotes, as JSON: of these types if it can be read as one of them, else a string."""
    if kinds != {"string"}:
        with contextlib.suppress(ValueError, RecursionError):
            kind = KINDS.get(type(value := _json_value(_PYTHON.get(text.strip(), text))), "null")
            if not kinds or kind in kinds or (kind == "integer" and "number" in kinds):
                return _dump(value)
    return _dump(text)


class TaggedArguments:
    """`<parameter=x>…</parameter>`, once for each argument."""

    _OPENING = re.compile(r"\s*<parameter=([^<>\n]*)>(?:\n|(?=[^\n]))")
    _BEGUN = re.compile(r"<parameter=[^<>\n]*>?")
    _STOPS = ("</parameter>", "\n<parameter=", "\n</function>")

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._lead = "{"  # before the next argument
        self._kinds: set[str] | None = None  # of the value that is open

    def read(self, text: str, *, final: bool) -> tuple[int, str, bool]:
        end, made = 0, ""
        while True:
            if self._kinds is None:
                if (opening := self._OPENING.match(text, end)) is None:
                    rest = text[end:].lstrip()
                    if not final and ("<parameter=".startswith(rest) or self._BEGUN.fullmatch(rest)):
                        return end, made, False
                    return end, made + ("{}" if self._lead == "{" else "}"), True
                properties = resolved(self._schema, self._schema).get("properties")
                known = properties.get(opening[1]) if isinstance(properties, dict) else None
                self._kinds = json_kinds(known, self._schema, {})
                made += f"{self._lead}{json.dumps(opening[1], ensure_ascii=False)}: " + '"' * (self._kinds == _TEXT)
                end, self._lead = opening.end(), ", "
            size, value = self._value(text[end:], self._kinds, final)
            end, made = end + size, made + value
            if self._kinds is not None:
                return end, made, False

    def _value(self, text: str, kinds: set[str], final: bool) -> tuple[int, str]:
        """How much of the value that is open is there, and its JSON. `_kinds` is None once it ends."""
        stops = [(at, stop) for stop in self._STOPS if (at := text.find(stop)) >= 0]
        if stops:
            at, stop = min(stops)
            value, self._kinds = text[:at].removesuffix("\n"), None
            end = at + len(stop) if stop == self._STOPS[0] else at
            return end, json.dumps(value, ensure_ascii=False)[1:] if kinds == _TEXT else typed_value(value, kinds)
        if kinds != _TEXT:  # the type is known at the end
            return len(text) if final else 0, ""
        size = num_certain(text, self._STOPS)  # a part of a tag is none of the string
        return len(text) if final else size, json.dumps(text[:size], ensure_ascii=False)[1:-1]
