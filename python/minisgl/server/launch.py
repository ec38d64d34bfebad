"""From a decided configuration to a running server, and back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import importlib
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import psutil

from minisgl.config.args import ServerArgs
from minisgl.config.resolve import prepare
from minisgl.config.runtime import Addresses, ServerConfig
from minisgl.errors import ConfigError
from minisgl.processes.supervisor import Supervisor, WorkerSpec, call_in, signals_deferred
from minisgl.processes.workers import ENDING_SIGNALS, scheduler_main, tokenizer_main
from minisgl.utils.folders import private_folder

if TYPE_CHECKING:
    from minisgl.server.frontend import Frontend

MakeSpecs = Callable[[ServerConfig, Addresses], list[WorkerSpec]]


def worker_specs(config: ServerConfig, addresses: Addresses) -> list[WorkerSpec]:
    """The children of a server: a scheduler per rank, the detokenizer, and tokenizers if they have own processes."""
    specs = [
        WorkerSpec(f"minisgl-TP{rank}-scheduler", scheduler_main, (config.engine, config.scheduler, addresses, rank))
        for rank in range(config.engine.tp_size)
    ]
    endpoints = {"minisgl-detokenizer-0": addresses.detokenizer}
    endpoints |= {f"minisgl-tokenizer-{index}": addresses.tokenizer(index) for index in range(addresses.num_tokenizer)}
    for name, endpoint in endpoints.items():
        specs.append(WorkerSpec(name, tokenizer_main, (config.tokenizer, addresses, endpoint)))
    return specs


def _run(
    use: Callable[[Supervisor, Addresses], Coroutine[Any, Any, int]],
    config: ServerConfig,
    make_specs: MakeSpecs = worker_specs,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Use all child processes of a server, when they are ready; none is left afterwards. For HTTP and for the shell
    alike. meanwhile: what to do while they start. Returns what `use` does, or 130 where a signal has ended it.

    Raises: ConfigError or WorkerDied when a child does not start.
    """
    try:
        with _stop_signals(), contextlib.ExitStack() as stack:
            with signals_deferred():
                directory = stack.enter_context(private_folder())
            addresses = Addresses(directory=directory, num_tokenizer=config.num_tokenizer)
            supervisor = Supervisor(make_specs(config, addresses), config.heartbeat_timeout, config.restart_workers)
            stack.callback(supervisor.stop)
            supervisor.start()
            meanwhile()
            supervisor.wait_ready()
            stack.callback(_ignore_signals)  # none may stop the end of the children half way
            return asyncio.run(use(supervisor, addresses))
    except KeyboardInterrupt:
        return 130


def serve(args: ServerArgs) -> int:
    """The server that the user asked for, from the port to the last child. Returns the exit status.

    Raises: ConfigError, WorkerDied when it cannot start. Where the port is taken, what else is wrong and can be told at
    once comes first, and nothing is fetched or loaded.
    """
    try:
        listener = bind_port(args.host, args.port)
    except ConfigError as problem:
        logging.getLogger("minisgl").setLevel(logging.ERROR)  # whatever comes, it is one line
        prepare(args, before_fetch=functools.partial(_raise, problem))
        raise
    with contextlib.closing(listener):
        return run_server(prepare(args), listener)


def _raise(problem: ConfigError) -> None:
    raise problem


def run_server(config: ServerConfig, listener: socket.socket, make_specs: MakeSpecs = worker_specs) -> int:
    """Serve on a bound socket until SIGTERM, Ctrl-C or their like. Returns the exit status: 0 after a clean stop, 1
    when a worker died, 130 when it was stopped before it was ready.

    Raises: ConfigError or WorkerDied when a child does not start; nothing has listened then.
    """

    async def use(supervisor: Supervisor, addresses: Addresses) -> int:
        from minisgl.server.serve import serve_http

        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return await serve_http(config, addresses, supervisor, listener)

    return _run(use, config, make_specs, _import_http)


def run_local(args: ServerArgs, use: Callable[[Frontend, ServerConfig], Awaitable[None]]) -> int:
    """Everything but HTTP: `use` gets the frontend of a running model (the shell does). Returns the exit status.

    Raises: ConfigError, WorkerDied when a child does not start; WorkerDied, from the streams, when one dies.
    """
    config = dataclasses.replace(prepare(args), restart_workers=0)

    async def use_locally(supervisor: Supervisor, addresses: Addresses) -> int:
        from minisgl.server.frontend import Frontend

        loop = asyncio.get_running_loop()
        async with Frontend(addresses) as frontend:
            supervisor.watch(functools.partial(call_in, loop, frontend.fail))
            await use(frontend, config)
        return 0

    return _run(use_locally, config)


def bind_port(host: str, port: int) -> socket.socket:
    """Take the TCP port, without listening yet. Raises: ConfigError naming the flag, and who has the port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        # Old connections in TIME_WAIT must not stop us; a second server that has not begun to listen must.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address[0], port, *address[2:]))  # getaddrinfo takes 65537 for 1
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except (OSError, OverflowError) as error:
        listener.close()
        code, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        flag = f"--host {host}" if code == errno.EADDRNOTAVAIL else f"--port {port}"
        why = f"cannot be taken: {reason.lower()}"
        if code == errno.EADDRINUSE:
            why = f"is taken{_holder(port)}; choose another"
        raise ConfigError(f"{flag}: {host}:{port} {why}") from None
    return listener


def _holder(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    try:
        sockets = psutil.net_connections("tcp")
        pids = [s.pid for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr and s.laddr.port == port]
        pid = next(filter(None, pids), None)
        return f" by {psutil.Process(pid).name()} (process {pid})" if pid else " by another user" if pids else ""
    except (psutil.Error, OSError):
        return ""


def _import_http() -> None:
    """FastAPI and uvicorn take most of a second. An exception from a signal could be lost inside of an import, so that
    is done by a thread."""
    thread = threading.Thread(target=importlib.import_module, args=("minisgl.server.serve",), daemon=True)
    thread.start()
    thread.join()


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and its like do what Ctrl-C does: an exception that lets everything be put away. Restored at the end."""
    signums = [s for s in ENDING_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]  # nohup
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _ignore_signals() -> None:
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
