"""Lines of the log: one for a message, whatever is in it."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from minisgl.utils.log import COLOURS, MAX_CHARS, MAX_LINES, JsonFormatter, LineFormatter


def formatted(message: str, *args: object, error: BaseException | None = None) -> str:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("minisgl.x", logging.INFO, "x.py", 1, message, args, info)
    return LineFormatter("server").format(record)


@pytest.mark.parametrize(
    "text",
    ["a\nb", "a\r\nb", "\x1b[31m", "\x00", "\x7f", "\x85", "\x9b2J", "\u2028", "\u202e", "\u2066", "\ud800", "\ufeff"],
)
def test_what_is_not_printed_is_escaped(text: str) -> None:
    line = formatted("said %s", text)
    assert line.isprintable()
    assert "\\" in line
    assert formatted("größer %s", "你好 🙂 \\").endswith("INFO größer 你好 🙂 \\")


def test_lines_are_bounded() -> None:
    line = formatted("%s", "a" * 10**6 + "end")
    assert len(line) < MAX_CHARS + 10
    assert line.endswith("end")


def test_tracebacks_stay_readable_and_look_like_nothing_else() -> None:
    def deep(left: int) -> None:
        if left == 0:
            raise ValueError("bad\n12:00:00 server INFO forged \x1b[31m" + "\nx" * 1000)
        deep(left - 1)

    try:
        deep(3)
    except ValueError as error:
        first, *lines = formatted("it failed", error=error).split("\n")
    assert first.endswith("INFO it failed")
    assert lines[0] == "    Traceback (most recent call last):"
    assert any(line.strip() == "deep(left - 1)" for line in lines)
    assert "    ValueError: bad" in lines
    assert all(line.startswith("    ") and line.isprintable() for line in lines)
    assert len(lines) <= MAX_LINES + 1
    assert sys.exc_info() == (None, None, None)


def _record(level: int, **more: object) -> logging.LogRecord:
    record = logging.LogRecord("minisgl.x", level, "x.py", 1, "said %s", ("\x1b[31m\n",), None)
    vars(record).update(more)
    return record


def test_a_terminal_has_colours_and_nothing_in_a_message_is_one() -> None:
    formatter = LineFormatter("server", COLOURS)
    assert formatter.format(_record(logging.INFO)).isprintable()
    line = formatter.format(_record(logging.ERROR))
    assert line.startswith("\x1b[31m") and line.endswith("\x1b[0m")
    assert line[5:-4].isprintable()


def test_json_has_one_object_on_each_line_with_the_fields_of_the_message() -> None:
    line = JsonFormatter("TP0").format(_record(logging.WARNING, fields={"request": {"id": "a\n"}}))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["role"], told["level"], told["request"]) == ("TP0", "WARNING", {"id": "a\n"})
    assert told["message"] == "said \\x1b[31m\\n"
