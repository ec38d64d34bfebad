"""How a worker is started: the supervisor is given a `Launcher`. The one here spawns processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from minisgl.processes.control import run_child
from minisgl.processes.signals import STOP_SIGNAL


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker to start: `body(control, *args)` runs in it. The body is a module-level function."""

    name: str
    body: Callable[..., None]
    args: tuple[Any, ...]

    @property
    def group(self) -> str:
        """Those who are started again together: all schedulers, since they compute together."""
        return "scheduler" if self.name.endswith("-scheduler") else self.name.removeprefix("minisgl-")


class Worker(Protocol):
    """A worker that was started, wherever it runs.

    connection: brings what it reports (`message.codec.ControlMsg`). sentinel: what `multiprocessing.connection.wait`
    finds ready when the worker has ended.
    """

    connection: Connection
    sentinel: int

    @property
    def exitcode(self) -> int | None:
        """None while it runs; -N where signal N has ended it."""

    def is_alive(self) -> bool: ...

    def stop(self) -> None:
        """Have it end by itself, soon."""

    def kill(self) -> None:
        """End it whatever it does."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, for `timeout` seconds at most."""


class Launcher(Protocol):
    def start(self, spec: WorkerSpec, life: int, is_lasting: bool) -> Worker:
        """Start a worker, without waiting for it. The signals that end us are deferred meanwhile.

        life: the same number for all that were started together, and for no others. is_lasting: the calling thread
        lasts until nobody wants the worker any more.
        """


class LocalWorker:
    """A child process."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.connection, self.sentinel = connection, process.sentinel
        self.is_alive, self.kill, self.join = process.is_alive, process.kill, process.join
        self._process = process

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, STOP_SIGNAL)


class LocalLauncher:
    """Spawns child processes, which end with us."""

    def start(self, spec: WorkerSpec, life: int, is_lasting: bool) -> LocalWorker:
        context = multiprocessing.get_context("spawn")
        try:
            os.getcwd()
        except FileNotFoundError:
            os.chdir("/")  # the working directory was removed; a child is told to go to ours
        ours, theirs = context.Pipe(duplex=False)
        args = (spec.name, theirs, is_lasting, life, spec.body, spec.args)
        process = context.Process(target=run_child, args=args, name=spec.name, daemon=True)
        process.start()
        theirs.close()
        return LocalWorker(process, ours)
