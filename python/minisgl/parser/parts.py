"""What parsers make of a model's text: parts of a message, as they come; and the parser of its reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisgl.config.chat import CLOSING, OPENING, REASONING_PARSERS, reasoning_after


@dataclass(frozen=True, slots=True)
class TextPart:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A tool call, or more of one. `index` counts the calls of a message; the first part of each has its name."""

    index: int
    name: str | None
    arguments: str  # JSON


Part = TextPart | ReasoningPart | CallPart


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
        return [TextPart(text)] if text else []


class Chain(Parser):
    """What `first` makes plain text of goes through `second`."""

    def __init__(self, first: Parser, second: Parser) -> None:
        super().__init__()
        self._first, self._second = first, second

    def _run(self, *, final: bool) -> list[Part]:
        text, self._buffer = self._buffer, ""
        passed: list[Part] = []
        for part in self._first.push(text) + (self._first.finish() if final else []):
            passed += self._second.push(part.text) if isinstance(part, TextPart) else [part]
        return passed + (self._second.finish() if final else [])


def num_certain(text: str, markers: Sequence[str]) -> int:
    """Characters of `text` that stay what they are whatever follows: its end may be the beginning of a marker, and
    whitespace before a marker belongs to it."""
    starts = range(max(0, len(text) - max(map(len, markers), default=1) + 1), len(text))
    end = next((start for start in starts if any(marker.startswith(text[start:]) for marker in markers)), len(text))
    return len(text[:end].rstrip())


class ThinkParser(Parser):
    """`<think>reasoning</think>answer`; the opening tag may stand at the end of the prompt instead.

    Whitespace around reasoning and before the answer is formatting, and dropped. A text that ends while the model still
    thinks is reasoning as a whole.

    name: as for `--reasoning-parser`; None when the model does not reason. prompt_end: the text with which the prompt
    ends.
    """

    def __init__(self, name: str | None, prompt_end: str) -> None:
        super().__init__()
        reasoning = reasoning_after(prompt_end, REASONING_PARSERS[name]) if name else ""  # as in `core.Grammar`
        self._without_tag = reasoning == "always"
        self._is_known = not reasoning  # whether the text begins with reasoning
        self._is_leading = False  # whitespace that comes next is formatting
        self.is_thinking = False  # the reasoning has begun, and goes on as far as can be seen

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        if not self._is_known:
            text = self._buffer.lstrip()
            has_tag = text.startswith(OPENING)
            if OPENING.startswith(text) and not (has_tag or final):
                return []
            self._buffer = text.removeprefix(OPENING) if has_tag else self._buffer
            self._is_known, self.is_thinking = True, has_tag or self._without_tag
            self._is_leading = self.is_thinking
        if self.is_thinking:
            self._strip()
            text, closing, rest = self._buffer.partition(CLOSING)
            size = len(text.rstrip()) if closing or final else num_certain(text, (CLOSING,))
            parts += [ReasoningPart(text[:size])] if size else []
            self._buffer = rest if closing else text[size:]
            if closing:
                self.is_thinking, self._is_leading = False, True
        if not self.is_thinking:
            self._strip()
            parts += super()._run(final=final)
        return parts

    def _strip(self) -> None:
        if self._is_leading:
            self._buffer = self._buffer.lstrip()
            self._is_leading = not self._buffer
