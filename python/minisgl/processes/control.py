"""Worker processes: who starts them, how one lives, what it tells the supervisor, how it ends; what signals do."""

import ctypes
import gc
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

from minisgl.errors import ConfigError, MiniSGLError
from minisgl.message.messages import Report, report_codec
from minisgl.utils.log import setup_logging
from minisgl.utils.process import handled

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
STOP_SIGNAL = signal.SIGUSR1  # from the supervisor
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # from outside, to the parent


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


class Control:
    """A child's line to its supervisor."""

    def __init__(self, connection: Connection, life: int = 0) -> None:
        self.life = life  # the same number for all who were started together, and for nobody else
        self._connection, self._next_beat = connection, 0.0

    def ready(self) -> None:
        """From now on garbage is collected. A full collection walks over nothing that libraries have made so far: that
        would be a tenth of a second between two tokens, or now. What of it is garbage is little."""
        gc.freeze()
        gc.enable()
        signal.signal(STOP_SIGNAL, lambda *_: sys.exit(0))
        self.send(Report(ready=True))

    def beat(self) -> None:
        """Tell that the main loop is alive. Call it as often as you like: it sends one message a second.

        It never waits: with a parent that does not listen (stopped, or `LLM`), the pipe fills up and beats are lost."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_SECONDS
            if select.select((), (self._connection,), (), 0)[1]:
                self.send(Report())

    def send(self, report: Report) -> None:
        try:
            self._connection.send_bytes(report_codec.encode([report]))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)  # the parent is gone


def run_child(spec: WorkerSpec, connection: Connection, is_lasting: bool, life: int) -> None:
    """The entry of every child: `body(control, *args)` in an orderly process.

    The process has its name as its title, leaves Ctrl-C and its like to the parent (they may reach the whole process
    group, and the parent drains first), ends at STOP_SIGNAL by an exception in the main thread (before it is ready, at
    once: an import may swallow the exception), ends when the parent does, and reports an error as one line. Exit
    status: 0 after STOP_SIGNAL, 2 for a ConfigError, else 1. is_lasting: the parent's thread that started it lasts
    until the parent has done with it. life: the same number for all that were started together."""
    gc.disable()
    control = Control(connection, life)
    ignore_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)  # our own children can be ended so
    signal.signal(STOP_SIGNAL, lambda *_: os._exit(0))
    _die_with_parent(is_lasting)
    from setproctitle import setproctitle

    setproctitle(spec.name)
    status = 1
    try:
        setup_logging(spec.name.removeprefix("minisgl-").removesuffix("-scheduler"))
        with suppress(SystemExit):  # by STOP_SIGNAL
            spec.body(control, *spec.args)
        status = 0
    except Exception as error:
        is_ours, is_config = isinstance(error, MiniSGLError), isinstance(error, ConfigError)
        logger.log(logging.DEBUG if is_ours else logging.ERROR, "%s ends", spec.name, exc_info=True)
        words = next(filter(None, map(str.strip, str(error).splitlines())), "no details")
        status = 2 if is_config else 1
        failure = words if is_ours else f"{type(error).__name__}: {words}"
        control.send(Report(failure=failure, config=is_config))
    finally:
        logging.shutdown()
        os._exit(status)  # threads of libraries must not keep a finished process alive


def _die_with_parent(is_lasting: bool) -> None:
    """The kernel's signal comes at once, but is tied to the parent's thread that started us; a thread watches too."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux" and is_lasting:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent.is_alive():
        os._exit(1)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


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
        lasts until nobody wants the worker any more."""
        try:
            os.getcwd()
        except FileNotFoundError:
            os.chdir("/")  # the working directory was removed; a child is told to go to ours
        ours, theirs = multiprocessing.Pipe(duplex=False)
        args = spec, theirs, is_lasting, life
        process = LocalProcess(target=run_child, args=args, name=spec.name, daemon=True)
        process.start()
        theirs.close()
        return Worker(spec, process, ours)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that end us wait until the end of the block. A child that is half started would complain about them.

    Children are born with them blocked, so that a Ctrl-C during their first moments is the parent's to handle."""
    caught, signums = list[int](), ENDING_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    try:
        with handled(lambda number, _: caught.append(number), signums):
            resource_tracker.ensure_running()  # else the first child starts it, which unblocks SIGINT and SIGTERM
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        for number in caught[:1]:
            signal.raise_signal(number)


def ignore_signals() -> None:
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
