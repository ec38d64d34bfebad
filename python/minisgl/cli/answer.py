"""How answers are shown: as they come, or in a terminal as Markdown that grows.

A block of Markdown (a paragraph, a list, code …) is drawn again while it grows, and stays as it is when the next one
begins. Output of a model is text: HTML in it is shown as it is written, and nothing of it moves the cursor.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown, Paragraph
from rich.segment import Segment
from rich.text import Text
from wcwidth import wrap

_CONTROL: dict[int, str | None] = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_DRAW_SECONDS, _DRAW_SHARE = 0.06, 4  # least time between two drawings, also as a multiple of what one takes
_NEVER_FIRST = "。，、！？；：）」』】》〉”’…"  # in a line: there is room for one of them behind the end of another
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class Screen:
    """Where answers are shown, and what the program says itself.

    is_drawn: the console is a terminal, for Markdown at its width; else all is written as it comes.
    is_watched: by a person, who wants to know more.
    """

    def __init__(self, console: Console, is_drawn: bool, is_watched: bool = True) -> None:
        self._console, self._is_drawn, self.is_watched = console, is_drawn, is_watched
        self._growing, self._next_draw = "", 0.0  # the block that is not complete
        bottom = lambda: _Answer(self._growing, is_whole=False)  # noqa: E731
        self._live = Live(console=console, transient=True, auto_refresh=False, get_renderable=bottom)
        self._drawer = ThreadPoolExecutor(1)  # a thread that Ctrl-C does not stop halfway, and the terminal with it

    def add(self, text: str) -> None:
        """More of an answer."""
        text = text.translate(_CONTROL)
        if self._is_drawn:
            self._drawer.submit(self._draw, self._growing + text.replace("\t", "    ")).result()
        else:
            self._console.file.write(text)
            self._console.file.flush()

    def _draw(self, text: str) -> None:
        lines = text.split("\n")
        begins = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
        for begin, end in pairwise(begins):
            self._console.print(_Answer("\n".join(lines[begin:end])), "", sep="\n")
        self._growing = "\n".join(lines[begins[-1] if begins else 0 :])
        if (now := time.monotonic()) >= self._next_draw:
            self._live.start()
            self._live.refresh()
            self._next_draw = time.monotonic() + max(_DRAW_SECONDS, _DRAW_SHARE * (time.monotonic() - now))

    def end(self) -> None:
        """The answer is complete, or was stopped."""
        self._drawer.submit(self._live.stop).result()
        self._console.print(_Answer(self._growing) if self._is_drawn else "")
        self._growing = ""

    def say(self, text: str) -> None:
        """What the program says itself."""
        self._console.print(Text(text, "dim"), soft_wrap=not self._is_drawn)


class _Wrapped(Paragraph):
    """A paragraph whose lines end between words or wide characters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.split("\n", allow_blank=True):
            begins = [0]
            for part in wrap(line.plain, options.max_width - 2, break_on_hyphens=False):
                begin = line.plain.index(part, begins[-1])
                begins.append(begin + (part[0] in _NEVER_FIRST))
            for shown in line.divide(begins[2:]):
                shown.rstrip()
                shown.no_wrap = True
                yield shown


class _Left(Heading):
    LEVEL_ALIGN: ClassVar = {}


class _Answer(Markdown):
    """As rich has it, but lines end where the model ends them, nothing is hidden, and no empty lines are around it.

    is_whole: or only as much of its end as the screen holds.
    """

    elements: ClassVar = {**Markdown.elements, "paragraph_open": _Wrapped, "heading_open": _Left}

    def __init__(self, text: str, is_whole: bool = True) -> None:
        super().__init__(text, code_theme="ansi_dark", hyperlinks=False)
        self._is_whole, self.parsed = is_whole, _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                child.type = "hardbreak" if child.type == "softbreak" else child.type

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = (part for part in super().__rich_console__(console, options) if isinstance(part, Segment))
        lines = list(Segment.split_lines(segments))
        filled = [index for index, line in enumerate(lines) if any(part.text.strip() for part in line)] or [0]
        first = filled[0] if self._is_whole else max(filled[0], filled[-1] + 2 - options.size.height)
        for line in lines[first : filled[-1] + 1]:
            yield from (*line, Segment.line())
