"""gpt-oss's format, OpenAI's `harmony`: messages, each with a header that says on which channel it is and to whom.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. What is on the channel
`analysis` is reasoning. A message to a function that the client has, `to=functions.NAME`, is a call, on whatever
channel, and its text the arguments. All else is the answer, also what is said on `commentary`; headers are not shown.
"""

import re
from collections.abc import Collection
from typing import Literal

from minisgl.config.chat import HARMONY, visible_tokens
from minisgl.parser.parts import BracketReader, Parser, Part, num_certain

MAX_HEADER = 512  # characters
_MARKERS = visible_tokens(HARMONY)
_BODY = "<|message|>"  # ends a header
_BORDERS = tuple(marker for marker in _MARKERS if marker not in (_BODY, "<|constrain|>"))  # end a text
_BEGINNINGS = (*_MARKERS, "to=")  # of a header; the role `assistant` stands in the prompt already
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser(Parser):
    """functions: names of those that can be called. in_answer: the prompt ends within the text of an answer."""

    def __init__(self, functions: Collection[str], *, in_answer: bool = False) -> None:
        super().__init__()
        self._functions = functions
        self._kind: Literal["", "text", "reasoning", "call", "behind"] = "text" if in_answer else ""  # "": of a header
        self._last = ""  # the kind of what was told last
        self._is_new = False  # nothing of this message has been told
        self._arguments: BracketReader | None = None  # of a call
        self._num_calls = 0

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._buffer and (self._read_text(parts, final) if self._kind else self._read_header(parts, final)):
            pass
        if final and self._kind == "call" and self._is_new:
            self._tell(parts, "{}")
        return parts

    def _read_header(self, parts: list[Part], final: bool) -> bool:
        """What begins with no header is the answer. A header that is cut off at the end says nothing."""
        text = self._buffer.lstrip()
        head, found, rest = text.partition(_BODY)
        begins = any(text.startswith(beginning) or beginning.startswith(text) for beginning in _BEGINNINGS)
        if found and begins and len(head) <= MAX_HEADER:
            self._buffer = rest
            self._open(parts, head)
        elif not begins or len(head) > MAX_HEADER or (final and text and not text.startswith("<|")):
            self._kind, self._is_new = "text", True
            self._tell(parts, self._buffer[:1])
            self._buffer = self._buffer[1:]
        return self._kind != ""

    def _open(self, parts: list[Part], head: str) -> None:
        name, channel = (([*pattern.findall(head)] or [""])[-1] for pattern in (_RECIPIENT, _CHANNEL))
        self._kind, self._is_new = "reasoning" if channel == "analysis" else "text", True
        if name in self._functions:
            self._kind = "call"
            parts.append(Part("call", "", name, self._num_calls))
            self._num_calls += 1

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        """Up to the next header; and arguments in JSON up to where they end, whatever is in their strings."""
        if self._kind == "call" and self._is_new:
            self._buffer = self._buffer.lstrip()
            self._arguments = BracketReader() if self._buffer.startswith("{") else None
        if self._arguments is not None:
            end, text, ended = self._arguments.read(self._buffer)
            self._tell(parts, text)
            self._buffer = self._buffer[end:]
            if ended:
                self._kind, self._arguments = "behind", None
            return ended
        starts = [at for border in _BORDERS if (at := self._buffer.find(border)) >= 0]
        end = min(starts) if starts else len(self._buffer) if final else num_certain(self._buffer, _BORDERS)
        self._tell(parts, self._buffer[:end] or "{}" * (bool(starts) and self._kind == "call" and self._is_new))
        self._buffer = self._buffer[end:]
        self._kind = "" if starts else self._kind
        return bool(starts)

    def _tell(self, parts: list[Part], text: str) -> None:
        """More of the message that is open; between two of one kind there is an empty line."""
        if not text:
            return
        if self._kind == "call":
            parts.append(Part("call", text, None, self._num_calls - 1))
        elif self._kind == "text" or self._kind == "reasoning":
            parts.append(Part(self._kind, "\n\n" + text if self._is_new and self._last == self._kind else text))
        self._last, self._is_new = self._kind, False
