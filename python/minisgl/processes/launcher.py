"""How a worker is started: the supervisor is given a `Launcher`, which spawns processes of this machine."""

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

from minisgl.message.messages import Report
from minisgl.processes.control import STOP_SIGNAL, run_child


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker to start: `body(control, *args)` runs in it. The body is a module-level function."""

    name: str
    body: Callable[..., None]
    args: tuple[Any, ...]

    @property
    def group(self) -> str:
        """Workers of one group are started again together: all schedulers are one, since they compute together."""
        return "scheduler" if self.name.endswith("-scheduler") else self.name.removeprefix("minisgl-")


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that was started, and what its supervisor knows of it."""

    spec: WorkerSpec
    process: BaseProcess  # perhaps elsewhere; `terminate` has it end by itself, soon
    connection: Connection  # brings what it reports
    silence: float = 0.0  # seconds, while it is watched
    ready: bool = False
    failure: Report | None = None  # its last words
    closed: bool = False  # its end of the connection


class LocalProcess(SpawnProcess):
    def terminate(self) -> None:
        assert self.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, STOP_SIGNAL)


class Launcher:
    """Spawns child processes, which end with us. Others may start workers elsewhere."""

    def start(self, spec: WorkerSpec, life: int, is_lasting: bool) -> Worker:
        """Start a worker, without waiting for it. Signals that end us are deferred meanwhile.

        life: the same number for all that are started together, and for no others. is_lasting: the calling thread
        lasts until nobody wants the worker any more.
        """
        try:
            os.getcwd()
        except FileNotFoundError:
            os.chdir("/")  # the working directory was removed; a child is told to go to ours
        ours, theirs = multiprocessing.Pipe(duplex=False)
        args = (spec.name, theirs, is_lasting, life, spec.body, spec.args)
        process = LocalProcess(target=run_child, args=args, name=spec.name, daemon=True)
        process.start()
        theirs.close()
        return Worker(spec, process, ours)
