"""The shell as a person uses it: `minisgl chat` in a terminal, and on a pipe. Nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest

from minisgl.kernel.jit import cache_dir
from tests.e2e.conftest import ROOT
from tests.models import tiny_model
from tests.tokenizers_fixture import make_byte_level
from tests.waiting import still_running

PROMPT = "\x1b[?2004h"  # bracketed paste on: the terminal is in raw mode, so keys are no signals now
ASKED, DRAWN = "\x1b[?2004l", "\x1b[?25l"  # bracketed paste off: the line is taken; no cursor: the answer is there
READY = "is ready. /help lists the commands"
NUM_PAGES = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "model"
    shutil.copytree(tiny_model("qwen3", vocab_size=400, eos_token_id=399, max_position_embeddings=4096), path)
    return make_byte_level(path)


def command(model: Path) -> list[str]:
    return ["-m", "minisgl", "chat", str(model), "--num-pages", str(NUM_PAGES), "--memory-ratio", "0.5"]


def environment(home: Path, **more: str) -> dict[str, str]:
    size = ("COLUMNS", "LINES")  # of another terminal, where a test runner sets them
    inherited = {n: value for n, value in os.environ.items() if not n.startswith("MINISGL_") and n not in size}
    paths = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "PYTHONPATH": str(ROOT / "python")}
    compiled = {"MINISGL_CACHE_DIR": str(cache_dir().parent)}  # which would else be in the home
    return {**inherited, **paths, **compiled, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", **more}


class Terminal:
    """The shell in a terminal of its own."""

    def __init__(self, model: Path, home: Path) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            command(model),
            env=environment(home, MINISGL_SHELL_MAX_TOKENS="3000"),
            encoding="utf-8",
            codec_errors="replace",
            timeout=200,
            dimensions=(40, 160),
        )
        self.child.delaybeforesend = 0.1
        self.child.expect_exact(READY)
        self.workers = psutil.Process(self.child.pid).children(recursive=True)

    def ask(self, line: str, *, expect: str) -> str:
        """Type a line; returns the match of `expect` in what follows."""
        self.child.sendline(line)
        self.child.expect(expect)
        return str(self.child.after)

    def wait_gone(self) -> int:
        """The exit status, once the program and all of its workers are gone."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert not still_running(self.workers)
        status: int | None = self.child.exitstatus
        assert status is not None
        return status


def test_the_module_starts_the_shell(model: Path, tmp_path: Path) -> None:
    """As Mini-SGLang's does; and so does the flag."""
    done = subprocess.run(
        [sys.executable, "-m", "minisgl.shell", "--model", str(model), "--memory-ratio", "0.5"],
        input="hello\n",
        env=environment(tmp_path, MINISGL_SHELL_MAX_TOKENS="5"),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


@pytest.fixture
def terminal(model: Path, tmp_path: Path) -> Iterator[Terminal]:
    running = Terminal(model, tmp_path)
    yield running
    running.child.close(force=True)


def test_a_session(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("/help", expect="forget the conversation")
    terminal.ask("/set max_tokens 0", expect="error: max_tokens must be at least 1")
    terminal.ask("/set max_tokens 8", expect="max_tokens is 8")
    terminal.ask("/set temperature 0", expect="temperature is 0.0")
    terminal.ask("hello", expect=r"cut after 8 tokens")
    stats = terminal.ask("/stats", expect=r"1 answer: \d+ prompt tokens .*? (\d+) output tokens")
    assert stats.endswith(" 8 output tokens")
    terminal.ask("again", expect=r"cut after 8 tokens")
    terminal.ask("/stats", expect=r"2 answers: \d+ prompt tokens \((?!0%)\d+% from the cache\)")
    terminal.ask("/nonsense", expect="unknown command /nonsense")
    terminal.ask("/reset", expect="the conversation is forgotten")
    terminal.child.sendline("/exit")
    assert terminal.wait_gone() == 0
    history = tmp_path / "state" / "minisgl" / "shell_history"
    assert "+hello" in history.read_text()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.ask("/set temperature 0", expect="temperature is 0.0")  # drawn at random, the end might come by itself
    terminal.child.expect_exact(PROMPT)
    terminal.child.sendline("tell me everything")
    terminal.child.expect_exact(ASKED)
    terminal.child.expect_exact(DRAWN)  # at once: its 1,605 tokens take half a second
    terminal.child.sendintr()
    terminal.child.expect_exact("(stopped)")
    stats = terminal.ask("/stats", expect=r"\d+ answers?: .*? (\d+) output tokens")
    num_output = int(re.findall(r"(\d+) output tokens", stats)[0])
    assert 0 < num_output < 3000
    terminal.ask("/set max_tokens 4", expect="max_tokens is 4")
    terminal.ask("and now?", expect="cut after 4 tokens")  # the engine is free again
    terminal.child.expect_exact(PROMPT)
    terminal.child.sendintr()
    terminal.child.expect_exact("(Ctrl-D or /exit leaves)")
    terminal.child.expect_exact(PROMPT)
    terminal.child.sendeof()
    assert terminal.wait_gone() == 0


def test_ctrl_c_and_sigterm_on_a_pipe_end_the_program(model: Path, tmp_path: Path) -> None:
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = environment(tmp_path, MINISGL_SHELL_MAX_TOKENS="3000", TMPDIR=str(tmp_path))
        with subprocess.Popen([sys.executable, *command(model)], env=env, **pipes) as shell:
            assert shell.stdin is not None and shell.stdout is not None
            shell.stdin.write(b"tell me everything\n")
            shell.stdin.flush()
            assert shell.stdout.read(1)
            shell.send_signal(signum)
            _, errors = shell.communicate(timeout=60)
        assert shell.returncode == status
        assert b"Traceback" not in errors
        assert not list(tmp_path.glob("minisgl-*"))  # its own folder is gone


@pytest.mark.parametrize("as_file", [True, False])
def test_lines_of_a_pipe_or_a_file(model: Path, tmp_path: Path, as_file: bool) -> None:
    text = "/set seed 7\n\n\xff\xfe\n/set top_k 5".encode("latin-1")  # what is no UTF-8, and no newline at the end
    (tmp_path / "in").write_bytes(text)
    with (tmp_path / "in").open("rb") as file:
        given = {"stdin": file} if as_file else {"input": text}
        env = environment(tmp_path, MINISGL_SHELL_MAX_TOKENS="1")
        args = [sys.executable, *command(model)]
        done = subprocess.run(args, **given, env=env, capture_output=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(errors="replace").splitlines()
    assert (lines[0], lines[-1]) == ("seed is 7", "top_k is 5")


def run_piped(model: Path, home: Path, lines: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command(model)],
        input=lines,
        env=environment(home, **env),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=250,
        check=False,
    )


def test_a_pipe(model: Path, tmp_path: Path) -> None:
    done = run_piped(model, tmp_path, "hello\n/set\n", MINISGL_SHELL_MAX_TOKENS="5", MINISGL_SHELL_TEMPERATURE="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no log between questions and answers
    assert "max_tokens is 5\n" in done.stdout
    assert "\x1b" not in done.stdout
    assert "> " not in done.stdout.partition("temperature is 0")[0]


def test_a_bad_environment_variable_is_one_line(model: Path, tmp_path: Path) -> None:
    done = run_piped(model, tmp_path, "", MINISGL_SHELL_TOP_P="2")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "MINISGL_SHELL_TOP_P" in line]
    assert errors == ["minisgl: error: MINISGL_SHELL_TOP_P: top_p must be above 0 and at most 1, not 2.0"]
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(model: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run(
            [sys.executable, *command(model)],
            input="hello\n",
            env=environment(tmp_path),
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=250,
            check=False,
        )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
