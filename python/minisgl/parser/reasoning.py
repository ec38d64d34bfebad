"""Parsers of reasoning: what stands between `<think>` and `</think>` at the beginning of a message."""

from __future__ import annotations

from minisgl.config.chat import CLOSING, OPENING, REASONING_PARSERS, reasoning_after
from minisgl.parser.parts import Parser, Part, ReasoningPart, num_certain


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
