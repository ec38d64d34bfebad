"""Processes that have imported what servers need, and fork servers and their workers: what takes most of a start is
then done once.

`python -m tests.forkers DESCRIPTOR` forks what `tests.forked` asks for on that socket. A server that is made so has a
child of its own that forks the server's workers, since a process with threads should not. What a worker is given is
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
import time
from contextlib import suppress
from multiprocessing import popen_fork, util
from multiprocessing.connection import Connection
from typing import Any

import setproctitle

PR_SET_CHILD_SUBREAPER = 36
HEADER = struct.Struct("<Q")
# Without torch, as a tokenizer imports it; what has no model; what has one.
TOKENIZER = ("minisgl.tokenizer.server",)
SERVER = ("minisgl.server.launch", "minisgl.server.serve", "minisgl.scheduler.scheduler", "minisgl.scheduler.transport")
SERVER += ("minisgl.scheduler.kv_events", "tests.fake_server.workers", "tests.fake_server.engine")
ENGINE = ("minisgl.engine.engine", "minisgl.engine.cpu", "minisgl.grammar.store", "minisgl.scheduler.grammar")


def send(line: socket.socket, message: object, descriptors: list[int]) -> None:
    data = pickle.dumps(message)
    socket.send_fds(line, [HEADER.pack(len(data))], descriptors)
    line.sendall(data)


def receive(line: socket.socket) -> tuple[Any, list[int]]:
    """Raises: EOFError when there is nobody at the other end any more."""
    header, descriptors, _, _ = socket.recv_fds(line, HEADER.size, 8)
    if not header:
        raise EOFError
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return pickle.loads(line.recv(HEADER.unpack(header)[0], socket.MSG_WAITALL)), descriptors


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


def fork_for(line: socket.socket) -> Any:
    """Fork a server for each request. Returns, in the server, what it is to be; in this process when nobody asks."""
    while True:
        try:
            request, (log, status) = receive(line)
        except EOFError:
            return None
        if request[0][1] == "minisgl":
            preload(ENGINE)
        gc.freeze()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those before that have ended
                pass
        if os.fork() > 0:
            os.close(log)
            os.close(status)
            continue
        line.close()
        if (server := os.fork()) > 0:  # this one waits for the server, and tells how it ends
            os.close(log)
            os.write(status, b"%d\n" % server)
            os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]))
            os._exit(0)
        os.close(status)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        return request


def run(args: list[str], env: dict[str, str]) -> None:
    """In a process that was forked: do what `python ARGS` does."""
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    if "FAULTS" in env or "PATIENT" in env:
        from tests.faults.points import inject

        inject()
    workers = fork_workers_for()
    forget_transformers()
    let_fork(workers)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = args[2:]
    runpy.run_module(args[1], run_name="__main__", alter_sys=True)


def fork_workers_for() -> socket.socket:
    """A child that forks workers of this process. They are this process's own children: it is their reaper."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    server, (ours, theirs) = os.getpid(), socket.socketpair()
    if os.fork() > 0:
        theirs.close()
        return ours
    ours.close()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    try:
        while True:
            (spec, *rest, environ, folder), descriptors = receive(theirs)
            if (between := os.fork()) == 0:
                between = os.getpid()
                if (worker := os.fork()) > 0:
                    theirs.send(HEADER.pack(worker))
                    os._exit(0)
                theirs.close()
                while os.getppid() == between:  # it ends with its parent, once that is the server
                    time.sleep(0.0005)
                if os.getppid() != server:
                    os._exit(1)
                os.environ.clear()
                os.environ.update(environ)
                os.chdir(folder)
                become(spec, rest, *descriptors)
            os.waitpid(between, 0)
            theirs.send(b"\n")
            for descriptor in descriptors:
                os.close(descriptor)
    except EOFError:
        os._exit(0)


def become(spec: Any, rest: list[Any], reports: int, alive: int, parent: int) -> None:
    """Be this worker. alive: a pipe that ends with this process. parent: one that ends with the server."""
    from minisgl.processes.control import LocalProcess, run_child
    from minisgl.processes.workers import tokenizer_main

    if spec.body is not tokenizer_main:
        forget_transformers()
    args = spec, Connection(reports, readable=False), *rest
    process: Any = LocalProcess(target=run_child, args=args, name=spec.name, daemon=True)
    process._parent_pid = os.getppid()
    os._exit(process._bootstrap(parent_sentinel=parent))


def let_fork(workers: socket.socket) -> None:
    """Have the workers of this server forked."""
    from minisgl.processes import control

    class Popen(popen_fork.Popen):
        def _launch(self, process: Any) -> None:
            spec, reports, *rest = process._args
            alive, theirs = os.pipe()
            parents, ours = os.pipe()
            message = spec, *rest, dict(os.environ), os.getcwd()
            send(workers, message, [reports.fileno(), theirs, parents])
            os.close(theirs)
            os.close(parents)
            self.pid = HEADER.unpack(workers.recv(HEADER.size, socket.MSG_WAITALL))[0]
            workers.recv(1)
            self.finalizer = util.Finalize(self, util.close_fds, (alive, ours))
            self.sentinel = alive

    control.LocalProcess._Popen = Popen


def main() -> None:
    line = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setproctitle.getproctitle()  # it looks for its place in memory now, before anybody changes the environment
    preload_tokenizer()
    preload(SERVER)
    if (request := fork_for(line)) is not None:
        del line
        run(*request)


if __name__ == "__main__":
    main()
