"""Parsers of tool calls in the text of a message, one for each format that model families use.

All hold back only what may belong to a call, and a call until it is whole: one that turns out to be malformed, is cut
off, or names a function that the client does not have, comes back as the text that it is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import NamedTuple, Protocol

from minisgl.parser.calls import BracketScanner, Call, json_calls, named_call, python_calls
from minisgl.parser.parts import CallPart, Part, TextPart, num_certain


class Found(NamedTuple):
    """What a candidate turned out to be: `end` characters, and the calls in them; None: they are text."""

    end: int
    calls: list[Call] | None


class Candidate(Protocol):
    """A text that may be a call. It keeps what it has seen of it, so that no character is read twice."""

    def read(self, text: str, *, final: bool) -> Found | None:
        """What the beginning of `text` is; None as long as more of it decides. `text` is what it was before, and more.

        final: there is no more; a candidate that is not whole is text then.
        """
        ...


class ToolParser(ABC):
    """Text and calls in turn. Formats say where a candidate begins and what it is.

    names: the functions that can be called.
    """

    markers: tuple[str, ...] = ()  # a candidate begins with one of these, wherever they stand
    bare = ""  # or with this character, at the beginning of the message or after a call
    between = ""  # what may stand between a call and the next, beside whitespace

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._buffer = ""
        self._at_start = True  # of the message, or behind a call: whitespace may turn out to be formatting
        self._num_calls = 0
        self._candidate: Candidate | None = None  # `_buffer` begins with it then
        self._lead = ""  # what stood before it, and is formatting if it is a call

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        return self._run(final=True)

    @abstractmethod
    def open(self) -> Candidate:
        """A new candidate."""

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        progress = True
        while progress and self._buffer:
            progress = self._read_text(parts, final) if self._candidate is None else self._read_call(parts, final)
        return parts

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        """Let out text up to the next candidate. False: nothing more can be said yet."""
        if self._at_start:
            num_lead = self._num_lead()
            rest = self._buffer[num_lead:]
            if self.bare and rest.startswith(self.bare):
                self._begin_call(num_lead)
                return True
            if not rest:
                if final:
                    self._emit(parts, 0 if self._num_calls else len(self._buffer))
                    self._buffer = ""
                return False
        start = min((at for marker in self.markers if (at := self._buffer.find(marker)) >= 0), default=-1)
        if start >= 0:
            end = len(self._buffer[:start].rstrip())
        else:
            end = len(self._buffer) if final else num_certain(self._buffer, (*self.markers, self.between))
        if end:
            self._at_start = False
            self._emit(parts, end)
            start -= end
        if start >= 0:
            self._begin_call(start)
            return True
        return False

    def _num_lead(self) -> int:
        """Characters at the beginning of the buffer that are formatting if a candidate follows."""
        lead = len(self._buffer) - len(self._buffer.lstrip())
        if self.between and self._num_calls and self._buffer.startswith(self.between, lead):
            rest = self._buffer[lead + len(self.between) :]
            lead = len(self._buffer) - len(rest.lstrip())
        return lead

    def _begin_call(self, start: int) -> None:
        self._lead, self._buffer = self._buffer[:start], self._buffer[start:]
        self._candidate = self.open()

    def _read_call(self, parts: list[Part], final: bool) -> bool:
        assert self._candidate is not None
        found = self._candidate.read(self._buffer, final=final)
        if found is None:
            return False
        self._candidate = None
        self._at_start = found.calls is not None
        if found.calls is None:
            self._buffer = self._lead + self._buffer
            self._emit(parts, len(self._lead) + found.end)
        else:
            self._buffer = self._buffer[found.end :]
            for call in found.calls:
                parts.append(CallPart(self._num_calls, call.name, call.arguments))
                self._num_calls += 1
        return True

    def _emit(self, parts: list[Part], size: int) -> None:
        if size:
            parts.append(TextPart(self._buffer[:size]))
            self._buffer = self._buffer[size:]


class HermesParser(ToolParser):
    """Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one after the other.

    A missing closing tag is forgiven when the JSON is whole.
    """

    markers = ("<tool_call>",)

    def open(self) -> Candidate:
        return _Tagged("<tool_call>", "</tool_call>", self._names)


class _Tagged:
    def __init__(self, opening: str, closing: str, names: Collection[str]) -> None:
        self._opening, self._closing, self._names = opening, closing, names
        self._scanner = BracketScanner(len(opening))
        self._searched = len(opening)

    def read(self, text: str, *, final: bool) -> Found | None:
        while (tag := self._next_tag(text)) is not None:
            start, end = tag
            if not self._scanner.in_string_at(text, start):
                return self._found(text, start, end)
            self._searched = start + 1
        if final:
            return self._found(text, len(text), len(text))
        self._searched = max(self._searched, len(text) - len(self._closing))  # longer than the opening tag
        return None

    def _next_tag(self, text: str) -> tuple[int, int] | None:
        """Where the call ends, and what follows begins: a closing tag, or without one the next call."""
        closing, opening = text.find(self._closing, self._searched), text.find(self._opening, self._searched)
        if opening >= 0 and (opening < closing or closing < 0):
            return opening, opening
        return (closing, closing + len(self._closing)) if closing >= 0 else None

    def _found(self, text: str, start: int, end: int) -> Found:
        return Found(end, json_calls(text[len(self._opening) : start], self._names))


class LlamaParser(ToolParser):
    """Llama 3.1 and newer, JSON: a message of `{"name": …, "parameters": {…}}`, several with `;` between them, after
    `<|python_tag|>` or not."""

    markers = ("<|python_tag|>",)
    bare = "{"
    between = ";"

    def open(self) -> Candidate:
        return _Bracketed(self.markers, "{", self._names)


class PythonicParser(ToolParser):
    """Llama 3.2 and 4 and others: a message that is a Python list of calls, `[f(a=1), g(b="x")]`."""

    markers = ("<|python_start|>", "<|python_tag|>")
    bare = "["
    between = "<|python_end|>"

    def open(self) -> Candidate:
        return _Bracketed(self.markers, "[", self._names)


class _Bracketed:
    """A value in brackets, after one of the markers or none. `[`: Python; `{`: JSON."""

    def __init__(self, markers: tuple[str, ...], bracket: str, names: Collection[str]) -> None:
        self._markers, self._bracket, self._names = markers, bracket, names
        self._start: int | None = None  # of the value
        self._scanner = BracketScanner()

    def read(self, text: str, *, final: bool) -> Found | None:
        if self._start is None:
            marker = next((marker for marker in self._markers if text.startswith(marker)), "")
            start = len(text) - len(text[len(marker) :].lstrip())
            if start == len(text):
                return Found(start, None) if final else None
            if text[start] != self._bracket:
                return Found(start, None)
            self._start = start
            self._scanner = BracketScanner(start, "\"'" if self._bracket == "[" else '"')
        end = self._scanner.scan(text)
        if end is None:
            return Found(len(text), None) if final else None
        read_calls = python_calls if self._bracket == "[" else json_calls
        calls = None if self._scanner.too_deep else read_calls(text[self._start : end], self._names)
        return Found(end, calls)


class MistralParser(ToolParser):
    """Mistral: `[TOOL_CALLS]` before a list `[{"name": …, "arguments": {…}}]`, or before each name and its arguments:
    `[TOOL_CALLS]name[ARGS]{…}`, with `[CALL_ID]…` between them in some versions, and without `[ARGS]` in others."""

    markers = ("[TOOL_CALLS]",)

    def open(self) -> Candidate:
        return _MistralCalls(self._names)


class _MistralCalls:
    _OPENING = "[TOOL_CALLS]"
    _NAME = re.compile(r"\s*([^\s\[\]{}]{1,128})\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?$")
    _MAX_HEAD = 256  # characters between the marker and the first brace

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._start: int | None = None  # of the JSON
        self._scanner = BracketScanner()
        self._name = ""

    def read(self, text: str, *, final: bool) -> Found | None:
        if self._start is None:
            start = self._json_start(text)
            if start is None:
                too_long = len(text) > len(self._OPENING) + self._MAX_HEAD
                return Found(len(self._OPENING), None) if final or too_long else None
            head = text[len(self._OPENING) : start]
            match = self._NAME.match(head)
            if head.strip() and match is None:
                return Found(len(self._OPENING), None)
            self._name = match[1] if match else ""
            self._start, self._scanner = start, BracketScanner(start)
        end = self._scanner.scan(text)
        if end is None:
            return Found(len(text), None) if final else None
        value = text[self._start : end]
        calls = named_call(self._name, value, self._names) if self._name else json_calls(value, self._names)
        return Found(end, calls)

    def _json_start(self, text: str) -> int | None:
        """Where the list or, after a name, the object begins."""
        body = len(self._OPENING)
        start = len(text) - len(text[body:].lstrip())
        if text.startswith("[", start):
            return start
        brace = text.find("{", body, body + self._MAX_HEAD)
        return brace if brace >= 0 else None
