"""Parsers of reasoning: what stands between `<think>` and `</think>` at the beginning of a message."""

from __future__ import annotations

from minisgl.config.chat import CLOSING, OPENING
from minisgl.parser.parts import Part, ReasoningPart, TextPart, num_certain


class ThinkParser:
    """`<think>reasoning</think>answer`; the opening tag may stand at the end of the prompt instead.

    Whitespace around reasoning and before the answer is formatting, and dropped. A text that ends while the model still
    thinks is reasoning as a whole.

    reasoning: as in `core.Grammar`. "always": a text without an opening tag is reasoning, too.
    """

    def __init__(self, reasoning: str) -> None:
        self._buffer = ""
        self._without_tag = self._reasoning if reasoning == "always" else self._text
        self._state = self._begin if reasoning else self._text

    @property
    def is_thinking(self) -> bool:
        """The reasoning has begun, and goes on as far as can be seen."""
        return self._state in (self._leading, self._reasoning)

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            state = self._state
            parts += self._state(final)
            if self._state == state:
                return parts

    def _begin(self, final: bool) -> list[Part]:
        """Nothing but whitespace yet, or a part of the tag."""
        text = self._buffer.lstrip()
        if text.startswith(OPENING):
            self._buffer = text[len(OPENING) :]
            self._state = self._leading
        elif final or not OPENING.startswith(text):
            self._state = self._leading if self._without_tag == self._reasoning else self._text
        return []

    def _leading(self, final: bool) -> list[Part]:  # noqa: ARG002
        """Whitespace before the reasoning."""
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._reasoning
        return []

    def _reasoning(self, final: bool) -> list[Part]:
        end = self._buffer.find(CLOSING)
        if end >= 0:
            text, self._buffer = self._buffer[:end].rstrip(), self._buffer[end + len(CLOSING) :]
            self._state = self._closed
        else:
            size = len(self._buffer.rstrip()) if final else num_certain(self._buffer, (CLOSING,))
            text, self._buffer = self._buffer[:size], self._buffer[size:]
        return [ReasoningPart(text)] if text else []

    def _closed(self, final: bool) -> list[Part]:  # noqa: ARG002
        """Whitespace before the answer."""
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._text
        return []

    def _text(self, final: bool) -> list[Part]:  # noqa: ARG002
        text, self._buffer = self._buffer, ""
        return [TextPart(text)] if text else []
