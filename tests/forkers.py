"""Processes that have imported what servers need, and fork servers and their workers: what takes most of a start is
then done once.

`python -m tests.forkers DESCRIPTOR` forks what it is asked for on that socket (`tests.forked`). A server made this way
has a child of its own that forks its workers, since a process with threads should not. What a worker is given is
pickled on its way, as it is where workers are spawned.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import runpy
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import popen_fork, util
from multiprocessing.connection import Connection
from typing import Any

import setproctitle

PR_SET_CHILD_SUBREAPER = 36
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
NUMBER = struct.Struct("<q")
# What a tokenizer imports, which has no torch; what has no model; what has one.
TOKENIZER = ("minisgl.tokenizer.server",)
SERVER = ("minisgl.server.launch", "minisgl.server.serve", "minisgl.scheduler.scheduler", "minisgl.scheduler.transport")
SERVER += ("minisgl.scheduler.kv_events", "tests.fake_server.workers", "tests.fake_server.engine")
ENGINE = ("minisgl.engine.engine", "minisgl.engine.cpu", "minisgl.grammar.store", "minisgl.scheduler.grammar")
_lock = threading.Lock()


def ask(line: socket.socket, message: object, *descriptors: int) -> tuple[int, int]:
    """Have a process forked. Returns its id, and a pipe that ends when nobody has more to say of it."""
    status, theirs = os.pipe()
    data = pickle.dumps(message)
    with _lock:
        socket.send_fds(line, [NUMBER.pack(len(data))], [theirs, *descriptors])
        line.sendall(data)
    os.close(theirs)
    return NUMBER.unpack(os.read(status, NUMBER.size))[0], status


def fork_for(line: socket.socket) -> None:
    """Fork what is asked for, for as long as there is somebody who asks. Descriptors: `ask`'s own, and those that it is
    given: where a server writes to, or what `become_worker` says."""
    from minisgl.processes.workers import scheduler_main

    while True:
        header, descriptors, _, _ = socket.recv_fds(line, NUMBER.size, 8)
        if not header:
            return
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        message = pickle.loads(line.recv(NUMBER.unpack(header)[0], socket.MSG_WAITALL))
        is_server = len(descriptors) == 2
        if message[0][1] == "minisgl" if is_server else message[0][0].body is scheduler_main:
            preload(ENGINE)
        gc.freeze()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those between servers and us that have ended
                pass
        if (between := os.fork()) == 0:
            line.close()
            status, *given = descriptors
            stand_between(status, given, is_server)
            os.close(status)
            become_server(*message, *given) if is_server else become_worker(*message, *given)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if not is_server:
            os.waitpid(between, 0)


def stand_between(status: int, given: list[int], is_server: bool) -> None:
    """Returns in another process than it is called in. This one tells its id, and of a server how it ends. A worker
    goes on when it is a child of the one who asked, who is the reaper of those that have lost their parent."""
    between = os.getpid()
    if (child := os.fork()) == 0:
        while not is_server and os.getppid() == between:
            time.sleep(0.0005)
        return
    for descriptor in given:
        os.close(descriptor)
    os.write(status, NUMBER.pack(child))
    if is_server:
        os.write(status, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def become_server(args: list[str], env: dict[str, str], log: int) -> None:
    """Do what `python ARGS` does."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    change_environment(env)
    tempfile.tempdir = None
    if env.keys() & {"FAULTS", "PATIENT", "RECORD_PLANS"}:
        from tests.faults.points import inject

        inject()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        fork_for(theirs)
        os._exit(0)
    theirs.close()
    forget_transformers()
    let_fork(lambda: ours)
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    sys.argv[1:] = args[2:]
    runpy.run_module(args[1], run_name="__main__", alter_sys=True)


def become_worker(
    args: Any, env: dict[str, str], folder: str, parent: int, reports: int, alive: int, parents: int
) -> None:
    """Be this worker. alive: a pipe that ends with this process. parents: one that ends with the parent."""
    from minisgl.processes.control import LocalProcess, run_child
    from minisgl.processes.workers import tokenizer_main

    if os.getppid() != parent:
        os._exit(1)
    spec, *rest = args
    change_environment(env)
    os.chdir(folder)
    if spec.body is not tokenizer_main:
        forget_transformers()
    args = spec, Connection(reports, readable=False), *rest
    process: Any = LocalProcess(target=run_child, args=args, name=spec.name, daemon=True)
    process._parent_pid = parent
    os._exit(process._bootstrap(parent_sentinel=parents))


def let_fork(line: Callable[[], socket.socket]) -> None:
    """Have the workers of this process forked by who is at the other end of the line, a child of it."""
    from minisgl.processes import control

    class Popen(popen_fork.Popen):
        def _launch(self, process: Any) -> None:
            spec, reports, *rest = process._args
            alive, theirs = os.pipe()
            parents, ours = os.pipe()
            message = (spec, *rest), dict(os.environ), os.getcwd(), os.getpid()
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            self.pid, status = ask(line(), message, reports.fileno(), theirs, parents)
            os.read(status, 1)  # it is our child now
            prctl(PR_SET_CHILD_SUBREAPER, 0)  # nobody else shall be
            for descriptor in (status, theirs, parents):
                os.close(descriptor)
            self.finalizer = util.Finalize(self, util.close_fds, (alive, ours))
            self.sentinel = alive

    prctl = ctypes.CDLL(None).prctl
    control.LocalProcess._Popen = Popen


def change_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def preload(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)


def preload_tokenizer() -> None:
    from minisgl.processes.workers import import_fast_tokenizer

    sys.modules["torch"] = None  # type: ignore[assignment]
    import_fast_tokenizer()
    preload(TOKENIZER)
    del sys.modules["torch"]


def forget_transformers() -> None:
    """Who is no tokenizer imports it as a new process does."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        del sys.modules[name]


def main() -> None:
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    setproctitle.getproctitle()  # it looks for its place in memory now, before anybody changes the environment
    preload_tokenizer()
    preload(SERVER)
    fork_for(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
