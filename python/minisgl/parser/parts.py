"""What parsers make of a model's text: parts of a message, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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


class Parser(Protocol):
    """One message's parser. The parts, put together, do not depend on how the text was cut. Nothing raises."""

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this text and were not before."""

    def finish(self) -> list[Part]:
        """The parts that waited for more, at the end of the text."""


class PlainText:
    """The parser of what is text and nothing else."""

    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self) -> list[Part]:
        return []


class Chain:
    """What `first` makes plain text of goes through `second`."""

    def __init__(self, first: Parser, second: Parser) -> None:
        self._first = first
        self._second = second

    def push(self, text: str) -> list[Part]:
        return self._pass_on(self._first.push(text))

    def finish(self) -> list[Part]:
        return self._pass_on(self._first.finish()) + self._second.finish()

    def _pass_on(self, parts: Sequence[Part]) -> list[Part]:
        passed: list[Part] = []
        for part in parts:
            passed += self._second.push(part.text) if isinstance(part, TextPart) else [part]
        return passed


def num_certain(text: str, markers: Sequence[str]) -> int:
    """Characters of `text` that stay what they are whatever follows: its end may be the beginning of a marker, and
    whitespace before a marker belongs to it."""
    end = len(text)
    for start in range(max(0, end - max(map(len, markers), default=1) + 1), end):
        if any(marker.startswith(text[start:]) for marker in markers):
            end = start
            break
    return len(text[:end].rstrip())
