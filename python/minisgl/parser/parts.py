"""What parsers make of a model's text: parts of a message, as they come; and the parser of its reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from minisgl.config.chat import CLOSING, OPENING, REASONING_PARSERS, reasoning_after


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
    """`<think>reasoning</think>answer`; the opening tag may stand at the end of the prompt instead.

    Whitespace around reasoning and before the answer is formatting, and dropped. A text that ends while the model still
    thinks is reasoning as a whole.

    name: as for `--reasoning-parser`; None when the model does not reason. prompt_end: the text with which the prompt
    ends. answer: the parser of what comes after the reasoning.
    """

    def __init__(self, name: str | None, prompt_end: str, answer: Parser | None = None) -> None:
        super().__init__()
        self._answer = answer or Parser()
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
