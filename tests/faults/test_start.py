"""A start that is ended, or whose server was killed: nothing is left, and nothing waits for ever."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from minisgl.utils.process import private_folder
from tests.faults.conftest import Server, fake, real
from tests.waiting import poll

Start = Callable[..., Server]
COMPILER = """#!{python}
import os, signal, sys, time
if "-c" in sys.argv:
    open({told!r}, "a").write(f"{{os.getpid()}}\\n")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(600)
"""


def descendants(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("moment", "signum"),
    list(enumerate([signal.SIGTERM, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM])),
)
def test_a_signal_at_any_moment_of_a_start(
    start: Start, tiny_path: Path, short_path: Path, moment: int, signum: signal.Signals
) -> None:
    """Before the command has begun it is the kernel that ends it; there is nothing to be left behind then."""
    server = start(real(tiny_path, "--num-tokenizer", "1"), wait=False, is_new=True, TMPDIR=str(short_path))
    time.sleep(0.1 + 0.9 * moment)
    server.children = descendants(server)
    server.process.send_signal(signum)
    assert server.wait_exit() in (130, 0, -signum)  # 0: it was ready, and drained
    assert server.orphans() == []
    assert list(short_path.iterdir()) == []
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_compilers_end_with_the_start(
    start: Start, tiny_path: Path, short_path: Path, tmp_path: Path, how: signal.Signals
) -> None:
    told, compiler = tmp_path / "compilers", tmp_path / "c++"
    compiler.write_text(COMPILER.format(python=sys.executable, told=str(told)))
    compiler.chmod(0o755)
    env = {"CXX": str(compiler), "MINISGL_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(short_path)}
    server = start(real(tiny_path), wait=False, **env)
    poll(lambda: told.exists() or server.process.poll() is not None, "nothing is compiled")
    time.sleep(0.5)
    compilers = {int(pid) for pid in told.read_text().split()}
    server.children = descendants(server)
    assert compilers <= {child.pid for child in server.children}
    server.process.send_signal(how)
    assert server.wait_exit() == (130 if how == signal.SIGTERM else -how)
    assert server.orphans() == []
    if how == signal.SIGKILL:
        assert list(short_path.iterdir()) != []
        start(fake(tmp_path / "none"), wait=False, TMPDIR=str(short_path)).wait_exit()
    assert list(short_path.iterdir()) == []


def test_folders_of_killed_servers_are_removed_and_no_others(
    start: Start, model_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, killed = (start(fake(model_path), TMPDIR=str(short_path)) for _ in range(2))
    foreign = short_path / "minisgl-of-somebody"
    foreign.mkdir()
    before = set(short_path.iterdir())
    killed.process.kill()
    killed.process.wait()
    assert killed.orphans() == []
    assert set(short_path.iterdir()) == before
    monkeypatch.setattr("tempfile.tempdir", str(short_path))
    with private_folder() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        left = set(short_path.iterdir())
        assert len(left) == len(before)  # one less, and this one
        assert {foreign, Path(folder)} < left
    alive.process.terminate()
    assert alive.wait_exit() == 0
    assert list(short_path.iterdir()) == [foreign]


def test_what_other_users_leave_is_not_opened(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe in the place of the lock would be waited for, for ever."""
    folder = short_path / "minisgl-of-somebody"
    folder.mkdir()
    os.mkfifo(folder / "owner")
    monkeypatch.setattr("tempfile.tempdir", str(short_path))
    monkeypatch.setattr("os.getuid", lambda: os.stat(folder).st_uid + 1)
    with private_folder():
        assert folder.exists()
    assert list(short_path.iterdir()) == [folder]


def test_a_log_that_nobody_reads_stops_nobody(model_path: Path, tmp_path: Path) -> None:
    """The reader of standard error stalls: 64 kB fit the pipe, and some MB are written."""
    code = (
        "import logging, sys, time\n"
        "from minisgl.utils.log import setup_logging\n"
        "setup_logging('server')\n"
        "begin = time.monotonic()\n"
        "for index in range(20000): logging.getLogger('minisgl').info('%d %s', index, 'x' * 200)\n"
        "print(time.monotonic() - begin, flush=True)\n"
        "sys.stdin.read()\n"
        "logging.getLogger('minisgl').info('the last one')\n"
    )
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as writer:
        assert float(writer.stdout.readline()) < 20
        num_lines = num_missing = 0
        while num_missing < 15000:  # from here on it is read
            line = writer.stderr.readline()
            assert line
            num_missing += int(line.split()[0]) if b"missing" in line else 0
            num_lines += 1
        assert num_lines < 5000
        writer.stdin.close()
        assert b"the last one" in writer.stderr.read()
        assert writer.wait(100) == 0
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as stalled:
        assert stalled.wait(100) == 0, "it ends, though nobody has read anything"
