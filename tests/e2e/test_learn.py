"""The course: what its lessons run and show is run and shown here, its exercises can be solved and failed, and both
languages say the same."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

from minisgl.learn import serving
from minisgl.learn.__main__ import CHECKS, check_lesson
from tests.e2e.conftest import PYTHONPATH, ROOT
from tools import lessons

LEARN = ROOT / "docs" / "learn"
CHINESE = sorted(LEARN.glob("[0-9]*.zh.md"))
ENGLISH = sorted({*LEARN.glob("[0-9]*.md")} - {*CHINESE})
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PORT = "1919"
SECONDS = 100  # for one command, on a busy machine
WRONG = {  # answers that look right
    1: "def workers(pid): return {}",
    2: "def durations(trace): return {'ttft': 0.0, 'waited': 0.0, 'computed': 0}",
    3: "def read_frame(frame): return [('user', 9)]",
    4: "def cached_tokens(before, prompt, page_size): return max(len(tokens) for tokens in before)",
    5: "def grant(left, budget): return [min(tokens, budget) for tokens in left]",
    6: "def finish_times(host, device, overlap): return [h + d for h, d in zip(host, device)]",
    7: "def sample(logits, temperature, top_k, top_p, number): return max(range(len(logits)), key=logits.__getitem__)",
    8: "def num_weights(config): return 0\ndef kv_bytes(config): return 0",
    9: "def part(name, weight, rank, size): return weight[rank::size]",
    10: "def speedup(before, after): return sum(before) / sum(after)",
}


class Block(NamedTuple):
    kind: str
    name: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    return [Block(*match.groups(default="")) for match in BLOCK.finditer(path.read_text())]


def pattern(lines: list[str], between: str = "") -> re.Pattern[str]:
    """Text as a lesson shows it: `…` is any text of a line, and alone any lines. between: what may be between lines."""
    parts = [r"(?:.*\n)*?" if line == "…" else ".*?".join(map(re.escape, line.split("…"))) + r" *\n" for line in lines]
    return re.compile(between.join(parts))


@contextmanager
def background(command: str, shown: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    """A program in a terminal of its own, from when it has said what the lesson shows."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=file, stderr=file, cwd=folder, env=env)
    try:
        deadline, expected = time.monotonic() + SECONDS, pattern(shown, r"(?:.*\n)*?")
        while not expected.search(log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, f"{command} said\n{log.read_text()}"
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)


class Terminal:
    """One shell for all commands of a lesson."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["timeout", str(3 * SECONDS), "bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=env,
        )

    def run(self, command: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\necho; echo END OF COMMAND\n")
        self._process.stdin.flush()
        lines = list(iter(self._process.stdout.readline, "END OF COMMAND\n"))
        return "".join(lines).rstrip("\n") + "\n" * (lines != ["\n"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)
        self._process.stdout.close()


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each `$ command` of a block, with what it reads up to a line END, and the lines that it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = 1 + (lines.index("END") if lines[0].endswith("<<'END'") else 0)
        yield "\n".join(lines[:end]), lines[end:]


@pytest.mark.parametrize("path", ENGLISH, ids=[path.stem for path in ENGLISH])
def test_what_a_lesson_shows_is_what_happens(path: Path, tmp_path: Path, unused_tcp_port: int) -> None:
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "100"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    blocks = blocks_of(path)
    with ExitStack() as stack:
        terminal: Terminal | None = None
        for block, after in zip(blocks, [*blocks[1:], Block("", "", "")], strict=True):
            text = block.text.replace(PORT, str(unused_tcp_port))
            if block.kind == "console" and block.name == "server":
                ((command, shown),) = commands_of(text)
                stack.enter_context(background(command, shown, tmp_path, env))
            elif block.kind == "console":
                if terminal is None:
                    terminal = Terminal(tmp_path, env)
                    stack.callback(terminal.close)
                for command, shown in commands_of(text):
                    printed = terminal.run(command)
                    assert pattern(shown).fullmatch(printed), f"$ {command}\n{printed}"
            elif block.kind == "python" and not block.name:
                script = tmp_path / "shown.py"
                script.write_text(text)
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", str(script)],
                    capture_output=True,
                    env=env,
                    cwd=tmp_path,
                    text=True,
                    timeout=SECONDS,
                    check=False,
                )
                assert after.kind == "text" and done.returncode == 0, done.stderr
                assert pattern(after.text.splitlines()).fullmatch(done.stdout), done.stdout


@pytest.fixture
def one_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a lesson's check starts, for all answers to it."""
    original = serving.serving
    with ExitStack() as stack:
        start = functools.cache(lambda *flags: stack.enter_context(original(*flags)))
        monkeypatch.setattr(serving, "serving", lambda *flags: nullcontext(start(*flags)))
        yield


@pytest.mark.usefixtures("one_server")
@pytest.mark.parametrize("number", CHECKS)
def test_each_exercise_can_be_solved_and_failed(number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert check_lesson(number, LEARN / "solutions" / f"lesson{number:02}.py") == 0
    assert f"lesson {number}: solved" in capfd.readouterr().out
    (beginning,) = [block.text for block in blocks_of(ENGLISH[number - 1]) if block.name == f"lesson{number:02}.py"]
    starts_servers = number <= 2
    for answer in (WRONG[number], "", "raise ValueError", *([] if starts_servers else [beginning])):
        path = tmp_path / "answer.py"
        path.write_text(answer)
        assert check_lesson(number, path) == 1
        assert "not yet: " in capfd.readouterr().err
    assert check_lesson(number, tmp_path / "missing.py") == 1
    assert "is not there" in capfd.readouterr().err


def test_both_languages_have_the_same_lessons() -> None:
    assert [path.stem for path in ENGLISH] == [path.stem.removesuffix(".zh") for path in CHINESE] and len(
        ENGLISH
    ) == len(CHECKS)
    for english, chinese in zip(ENGLISH, CHINESE, strict=True):
        both = [[block for block in blocks_of(path) if block.kind != "mermaid"] for path in (english, chinese)]
        shown, translated = (
            [block if not block.name.startswith("lesson") else block.name for block in b] for b in both
        )
        assert shown == translated, english.name
        links, others = (re.findall(r"#L\d+|arxiv\.org/abs/[\d.]+\d", path.read_text()) for path in (english, chinese))
        assert sorted(links) == sorted(others), english.name
        headings, theirs = (re.findall(r"^#+ ", path.read_text(), re.MULTILINE) for path in (english, chinese))
        assert headings == theirs, english.name


def test_lessons_name_lines_and_messages_that_there_are() -> None:
    assert lessons.main([]) == 0
