"""What parsers make of a model's text: parts of a message, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
