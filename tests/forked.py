"""Servers, and ranks of an `LLM`, without the start of a Python process: forked from one that has imported what they
need (`forkers.py`)."""

from __future__ import annotations

import atexit
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from minisgl.processes.control import LocalProcess
from tests.forkers import NUMBER, ask, let_fork

ROOT = Path(__file__).parents[1]
BASE = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"}
INJECTED = f"{ROOT / 'tests' / 'faults' / 'inject'}{os.pathsep}{BASE['PYTHONPATH']}"  # with `tests/faults/points.py`
# What is read when it is needed, and not by an import; the last is torch's own.
LATE = "MINISGL_", "LOG_", "FAULTS", "PATIENT", "RECORD_PLANS", "TMPDIR", "PYTEST_", "TORCHINDUCTOR_CACHE_DIR"


def can_be_forked(args: list[str], env: dict[str, str]) -> bool:
    """Whether a forked process would do the same as a new one."""
    if args[:2] not in (["-m", "minisgl"], ["-m", "tests.fake_server"]):
        return False
    differs = {name for name in {*BASE, *env} if BASE.get(name) != env.get(name)}
    is_known = env["PYTHONPATH"] in (BASE["PYTHONPATH"], INJECTED)
    return is_known and all(name.startswith(LATE) for name in differs - {"PYTHONPATH"})


class Forked:
    """A process that was forked: what `subprocess.Popen` is of a new one."""

    pid: int
    returncode: int | None

    def __init__(self, args: list[str], env: dict[str, str], output: BinaryIO) -> None:
        self.pid, self._status = ask(_line(), (args, env), output.fileno())
        self.returncode = None
        self._close = weakref.finalize(self, os.close, self._status)

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = NUMBER.unpack(os.read(self._status, NUMBER.size))[0]
            self._close()
        return self.returncode


@contextmanager
def ranks() -> Iterator[None]:
    """The ranks of an `LLM` in this process are forked, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalProcess, "_Popen", LocalProcess._Popen)  # as it is again afterwards
        let_fork(_line)
        yield


@functools.cache
def _line() -> socket.socket:
    """To this process's own forker, which ends when this process does."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "tests.forkers", str(theirs.fileno())]
        forker = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=BASE, cwd=ROOT)

    def end() -> None:
        ours.close()
        forker.wait()

    atexit.register(end)
    return ours
