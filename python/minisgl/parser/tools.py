"""Parsers of tool calls in the text of a message, one for each format that model families use.

All hold back only what may belong to a call: what turns out to be none, or names a function that the client does not
have, comes back as the text that it is. A call whose name and first bracket of arguments are there has begun, and its
arguments are passed on as they come, to where they end or the text does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from minisgl.grammar.schema import resolved
from minisgl.parser.calls import BracketReader, calls_in, json_kinds, json_value, python_value, typed_value
from minisgl.parser.forced import UNKNOWN
from minisgl.parser.parts import Parser, Part, num_certain


class Rest:
    """What follows a call that has begun: its arguments, and texts that close the call, each of which may be missing.

    arguments: what reads them; None: they have come with the call. in_list: at the end, another call may follow after
    a comma.
    """

    def __init__(self, arguments: Arguments | None, *closers: str, in_list: bool = False) -> None:
        self.in_list = in_list
        self._arguments = arguments
        self._closers = [closer for closer in closers if closer]

    def take(self, text: str, *, final: bool) -> tuple[int, str, bool]:
        """How many characters of the text are read, the JSON of arguments in them, and whether the call ends there."""
        end, arguments = 0, ""
        if self._arguments is not None:
            end, arguments, ended = self._arguments.read(text, final=final)
            if not ended:
                return end, arguments, False
            self._arguments = None
        while self._closers:
            closer, rest = self._closers[0], text[end:].lstrip()
            if closer == "}" and rest.startswith(","):  # other fields, such as an id
                rest = re.sub("^[^][{}<]*", "", rest)
            if rest.startswith(closer):
                end = len(text) - len(rest) + len(closer)
                self.in_list &= closer != "]"
            elif closer.startswith(rest) and not final:
                return end, arguments, False
            self._closers.pop(0)
        return end, arguments, True


class Found(NamedTuple):
    """What may be a call turned out to be: `end` characters, and the calls in them; None: they are text. rest: of the
    last call."""

    end: int
    calls: list[Part] | None = None
    rest: Rest | None = None


class ToolParser(Parser):
    """Text and calls in turn. A call is JSON, `{"name": …, "arguments": {…}}`, or a list of such, unless a format says
    otherwise.

    functions: those that can be called, and the JSON schemas of their arguments.
    """

    markers: tuple[str, ...] = ()  # what may be a call begins with one of these, wherever they stand
    bare = ""  # or with this character, at the beginning of the message or after a call
    closing = ""  # the tag behind it
    between = ""  # what may stand between a call and the next, beside whitespace
    brackets, quotes = "{[", '"'  # of a call, and of strings in it
    value = staticmethod(json_value)  # what a text of calls is in JSON
    HEAD: ClassVar[re.Pattern[str]] = re.compile(
        r'\s*(\[?)\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*'
        r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
    )
    # The beginning of an object that is no call, so that it need not be waited for.
    OTHER: ClassVar[re.Pattern[str]] = re.compile(
        r'\{\s*(?:[^"\s]|"(?!(?:name|type|function|arguments|parameters|id)")[^"\\]*"|'
        r'"name"\s*:\s*(?:[^"\s]|"([^"\\]*)"))'
    )

    def __init__(self, functions: Mapping[str, Any]) -> None:
        super().__init__()
        self._functions = functions
        self._at_start = True  # of the message, or behind a call: whitespace may turn out to be formatting
        self._num_calls = 0
        self._state = self._read_text  # what reads on; False: nothing more can be said yet
        self._reader = BracketReader()  # of what may be a call, with which `_buffer` begins then
        self._num_read = 0  # characters of it that the reader has seen
        self._lead = ""  # what stood before it, and is formatting if it is a call
        self._rest = Rest(None)  # of a call, with which `_buffer` begins
        self._in_list = False  # the last call stood in a JSON list that goes on

    def read(self, text: str, *, final: bool) -> Found | None:
        """What the beginning of `text` is, a marker included; None as long as more of it decides. `text` is what it was
        before, and more.

        final: there is no more; what is not whole is text then.
        """
        start = next((len(marker) for marker in self.markers if text.startswith(marker)), 0)
        head = self.HEAD.match(text, start)
        in_list = self._in_list and not start
        if head is not None and head[2] in self._functions:
            in_list |= bool(head[1])
            rest = Rest(BracketReader(), "}", "]" if in_list else "", self.closing, in_list=in_list)
            return Found(head.end(), [Part("call", "", head[2])], rest)
        start = len(text) - len(text[start:].lstrip())
        if start == len(text):
            return Found(start) if final else None
        other = self.OTHER.match(text, start)
        if text[start] not in self.brackets or (other is not None and other[1] not in self._functions):
            return Found(start + 1)
        self._num_read = self._num_read or start
        size, _, ended = self._reader.read(text[self._num_read :])
        self._num_read += size
        if not ended:
            return Found(len(text)) if final else None
        calls = None if self._reader.too_deep else calls_in(text[start : self._num_read], self._functions, self.value)
        return Found(self._num_read, calls, Rest(None, "]" if in_list else "", self.closing, in_list=in_list))

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._buffer and self._state(parts, final):
            pass
        return parts

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        """Let out text up to what may be a call."""
        starts = [at for marker in self.markers if (at := self._buffer.find(marker)) >= 0]
        if starts or final:
            end = len(self._buffer[: min(starts)].rstrip()) if starts else len(self._buffer)
        else:
            end = num_certain(self._buffer, (*self.markers, self.between))
        if self._at_start:
            between = "," if self._in_list else self.between if self._num_calls else ""
            rest = re.sub(rf"\s*(?:{re.escape(between)})?\s*", "", self._buffer, count=1)
            bare = "{" if self._in_list else self.bare
            if bare and rest.startswith(bare):
                starts, end = [len(self._buffer) - len(rest)], 0
            elif not rest and (self._num_calls or not final):
                self._buffer = "" if final else self._buffer
                return False
        if end:
            self._at_start = self._in_list = False
            parts.append(Part("text", self._buffer[:end]))
            self._buffer = self._buffer[end:]
        if starts:
            size = min(starts) - end
            self._lead, self._buffer = self._buffer[:size], self._buffer[size:]
            self._reader, self._num_read = BracketReader(self.quotes), 0
            self._state = self._read_call
        return bool(starts)

    def _read_call(self, parts: list[Part], final: bool) -> bool:
        found = self.read(self._buffer, final=final)
        if found is None:
            return False
        self._at_start = found.calls is not None
        if found.calls is None:
            text, end = self._lead + self._buffer, len(self._lead) + found.end
            parts.append(Part("text", text[:end]))
            self._buffer, self._state = text[end:], self._read_text
            return True
        self._buffer = self._buffer[found.end :]
        for call in found.calls:
            parts.append(call._replace(call_index=self._num_calls))
            self._num_calls += 1
        self._rest, self._state = found.rest or Rest(None), self._read_rest
        return True

    def _read_rest(self, parts: list[Part], final: bool) -> bool:
        num_read, text, ended = self._rest.take(self._buffer, final=final)
        self._buffer = self._buffer[num_read:]
        if text:
            parts.append(Part("call", text, None, self._num_calls - 1))
        if ended:
            self._in_list, self._state = self._rest.in_list, self._read_text
        return ended


class HermesParser(ToolParser):
    """Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one after the other.

    A missing closing tag is forgiven when the JSON is whole.
    """

    markers = ("<tool_call>",)
    closing = "</tool_call>"


class LlamaParser(ToolParser):
    """Llama 3.1 and newer, JSON: a message of `{"name": …, "parameters": {…}}`, several with `;` between them, after
    `<|python_tag|>` or not."""

    markers = ("<|python_tag|>",)
    bare = "{"
    between = ";"


class PythonicParser(ToolParser):
    """Llama 3.2 and 4 and others: a message that is a Python list of calls, `[f(a=1), g(b="x")]`."""

    markers = ("<|python_start|>", "<|python_tag|>")
    bare = "["
    between = "<|python_end|>"
    brackets, quotes = "[", "\"'"
    value = staticmethod(python_value)
    HEAD = re.compile("$^")


class MistralParser(ToolParser):
    """Mistral: `[TOOL_CALLS]` before a list `[{"name": …, "arguments": {…}}]`, or before each name and its arguments:
    `[TOOL_CALLS]name[ARGS]{…}`, in some versions with `[CALL_ID]…` between them, in others without `[ARGS]`."""

    markers = ("[TOOL_CALLS]",)
    NAMED = re.compile(r"\[TOOL_CALLS\]\s*([^\s\[\]{}]{1,128})\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
    MAX_HEAD = 256  # characters before the first brace

    def read(self, text: str, *, final: bool) -> Found | None:
        named = self.NAMED.match(text)
        if named is not None and named[1] in self._functions:
            return Found(named.end(), [Part("call", "", named[1])], Rest(BracketReader()))
        rest = text.removeprefix(self.markers[0]).lstrip()
        if rest[:1] in ("", *self.brackets):
            return super().read(text, final=final)
        is_other = named is not None or "{" in rest or len(text) > self.MAX_HEAD or final
        return Found(len(self.markers[0])) if is_other else None


class QwenCoderParser(ToolParser):
    """Qwen3-Coder: `<tool_call><function=name><parameter=x>…</parameter></function></tool_call>`. Strings stand there
    as they are, other values in JSON. What opens or closes the call may be missing."""

    markers = ("<tool_call>", "<function=")
    HEAD = re.compile(r"(?:<tool_call>)?\s*<function=\s*([^<>\n]{1,128})>")
    BEGUN = re.compile(r"(?:<tool_call>)?\s*<function=[^<>\n]{0,128}")

    def read(self, text: str, *, final: bool) -> Found | None:
        head = self.HEAD.match(text)
        if head is not None and (name := head[1].strip()) in self._functions:
            arguments = TaggedArguments(self._functions[name] or {})
            return Found(head.end(), [Part("call", "", name)], Rest(arguments, "</function>", "</tool_call>"))
        rest = text.removeprefix("<tool_call>").lstrip()
        if not final and ("<function=".startswith(rest) or self.BEGUN.fullmatch(text)):
            return None
        return Found(1)


_TEXT = {"string"}  # the types of a value of which each part can be passed on


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
                opening = self._OPENING.match(text, end)
                if opening is None:
                    rest = text[end:].lstrip()
                    if not final and ("<parameter=".startswith(rest) or self._BEGUN.fullmatch(rest)):
                        return end, made, False
                    return end, made + ("{}" if self._lead == "{" else "}"), True
                properties = resolved(self._schema, self._schema).get("properties")
                known = properties.get(opening[1]) if isinstance(properties, dict) else None
                self._kinds = json_kinds(known, self._schema)
                made += f"{self._lead}{json.dumps(opening[1], ensure_ascii=False)}: "
                made += '"' if self._kinds == _TEXT else ""
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
            return end, _within(value) + '"' if kinds == _TEXT else typed_value(value, kinds)
        if kinds != _TEXT:  # the type is known at the end
            return len(text) if final else 0, ""
        size = num_certain(text, self._STOPS)  # a part of a tag is none of the string
        return len(text) if final else size, _within(text[:size])


def _within(text: str) -> str:
    """A part of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


Arguments = BracketReader | TaggedArguments
TOOL_PARSERS: dict[str, type[ToolParser]] = {  # by the names of `--tool-call-parser`
    "hermes": HermesParser,
    "qwen": HermesParser,
    "qwen3_coder": QwenCoderParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}


def make_tool_parser(name: str | None, functions: Mapping[str, Any]) -> Parser:
    """name: None when the format is not known. functions: the JSON schemas of their arguments, by name."""
    return TOOL_PARSERS[name or UNKNOWN](functions)
