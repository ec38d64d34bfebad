"""Answers in a terminal: what stands on its screen, as an emulator of terminals has it."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from io import StringIO

import pyte
import pytest
from rich.console import Console
from wcwidth import wcswidth

from minisgl.cli import answer
from minisgl.cli.answer import Screen

TEXT = """\
# A title

Some **bold** words and `code` that go on for longer than one line of the terminal does, and
a line that the model ended. <think>Not hidden</think>

- first
- second, which is longer than one line of the terminal is too
  1. 嵌套的列表项：使用图形处理器加速时，需要安装驱动程序（版本较新）。否则会很慢！

使用 GPU 加速时需要安装驱动程序，版本不能太旧，否则会很慢。这是一个很长的中文段落，用来测试换行是否正确。
```python
def add(a, b):
    return a + b  # <b>
```

| name | value |
|---|---|
| one | 1 |

> a quotation

The end.
"""


@pytest.fixture(autouse=True)
def drawn_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "_DRAW_SECONDS", 0.0)
    monkeypatch.setattr(answer, "_DRAW_SHARE", 0)


def shown(pieces: Sequence[str], width: int = 40, height: int = 12) -> list[str]:
    """The lines of a terminal, those that have left its screen first, after an answer that came in pieces."""
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height, legacy_windows=False)
    screen = Screen(console, is_drawn=True)
    for piece in pieces:
        screen.add(piece)
    screen.end()
    screen.say("(said)")
    terminal = pyte.HistoryScreen(width, height, history=1000)
    terminal.set_mode(pyte.modes.LNM)
    pyte.Stream(terminal).feed(out.getvalue())
    above = ["".join(line[column].data for column in range(width)) for line in terminal.history.top]
    lines = [line.rstrip() for line in (*above, *terminal.display)]
    assert lines[-1] == "" and terminal.cursor.x == 0 and not terminal.cursor.hidden
    return lines[: lines.index("(said)")]


@pytest.mark.parametrize("width", [20, 40, 100])
def test_it_does_not_matter_in_which_pieces_it_comes(width: int) -> None:
    whole = shown([TEXT], width)
    rng = random.Random(0)
    pieces, rest = list[str](), TEXT
    while rest:
        num = rng.randint(1, 9)
        pieces.append(rest[:num])
        rest = rest[num:]
    assert shown(pieces, width) == whole
    assert all(wcswidth(line) <= width for line in whole)


def test_markdown_is_rendered() -> None:
    lines = shown([TEXT], 40)
    text = "\n".join(lines)
    assert lines[:4] == ["A title", "", "Some bold words and code that go on", "for longer than one line of the"]
    assert "a line that the model ended." in text and "<think>Not hidden</think>" in text.replace("\n", " ")
    assert " • first\n • second" in text
    assert "def add(a, b):\n     return a + b  # <b>" in text
    assert "**" not in text and "```" not in text and "|" not in text


def test_chinese_is_broken_between_characters_and_no_line_begins_with_a_comma() -> None:
    paragraph = "使用 GPU 加速时需要安装驱动程序，版本不能太旧，否则会很慢。" * 5
    for width in range(12, 40):
        lines = shown([paragraph], width)
        assert "".join(lines).replace(" ", "") == paragraph.replace(" ", "")
        assert not any(line[0] in "，。" for line in lines)
        # Full, but for a word, and for the room that a comma takes.
        assert all(width - 10 < wcswidth(line) <= width for line in lines[:-1]), lines


def test_what_is_longer_than_the_screen_is_all_there() -> None:
    code = "\n".join(f"line {number}" for number in range(50))
    pieces = [f"```\n{code}\n```\n\nand more"]
    for pieces in (
        [f"```\n{code}\n```\n\nand more"],
        [f"{line}\n" for line in f"```\n{code}\n```\n\nand more".split("\n")],
    ):
        assert [line.strip() for line in shown(pieces)] == [*code.split("\n"), "", "and more"]


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J\x1b[H\x1b]0;title\x07gone",
        "a\rb\x9b2J\x08",
        "[link](javascript:alert) ![x](http://y)",
        "\x1b]8;;x\x1b\\y",
    ],
)
def test_output_of_a_model_does_not_command_the_terminal(text: str) -> None:
    before = ["Kept."]
    lines = shown([f"Kept.\n\n{text}"])
    assert lines[:1] == before
    assert len(lines) == 3


def test_unfinished_and_odd_markdown_does_no_harm() -> None:
    for text in (
        "```",
        "| a |",
        "**",
        "- ",
        "1.",
        "> >",
        "<div",
        "[a](",
        "#",
        "\n\n\n",
        "---\n",
        "\t",
        "&lt;",
        "a\n=",
        "$$x$$",
    ):
        assert shown([text]) is not None
        assert shown(list(text * 3)) is not None


@pytest.mark.parametrize("place", ["set_live", "show_cursor", "push_render_hook", "pop_render_hook"])
def test_ctrl_c_while_the_terminal_is_changed_waits_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Rich's Live takes several steps to start and to stop, and cannot be stopped between two of them."""
    out, presses = StringIO(), [True]
    console = Console(file=out, force_terminal=True, width=40, height=12, legacy_windows=False)
    screen, step = Screen(console, is_drawn=True), getattr(console, place)

    def pressed(*args: object) -> object:
        if presses:
            presses.clear()
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(console, place, pressed)
    with pytest.raises(KeyboardInterrupt):
        screen.add("Some *words*")
        screen.end()
    screen.end()
    terminal = pyte.Screen(40, 12)
    pyte.Stream(terminal).feed(out.getvalue().replace("\n", "\r\n"))
    assert terminal.display[0].rstrip() == "Some words" and not terminal.cursor.hidden
