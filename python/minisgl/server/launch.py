"""From the port that the user asked for to a running server, and back to nothing."""

import asyncio
import contextlib
import errno
import gc
import signal
import socket

import psutil

from minisgl.config.args import ServerArgs
from minisgl.config.resolve import prepare
from minisgl.config.runtime import ServerConfig
from minisgl.errors import ConfigError
from minisgl.message.sockets import ipc_endpoints
from minisgl.processes.control import ENDING_SIGNALS, Launcher, ignore_signals, signals_deferred
from minisgl.processes.supervisor import Supervisor
from minisgl.processes.workers import worker_specs
from minisgl.utils.process import handled, private_folder


def serve(args: ServerArgs) -> int:
    """The server that the user asked for, from the port to the last child. Returns the exit status.

    Raises: ConfigError, WorkerDied when it cannot start; that the port is taken comes before anything is loaded.
    """
    with contextlib.closing(bind_port(args.host, args.port)) as listener:
        return run_server(prepare(args), listener, Launcher())


def run_server(config: ServerConfig, listener: socket.socket, launcher: Launcher) -> int:
    """Serve on a bound socket until SIGTERM, Ctrl-C or their like. Returns the exit status: 0 after a clean stop, 1
    when a worker died, 130 when it was stopped before it was ready.

    Raises: ConfigError or WorkerDied when a child does not start; nothing has listened then.
    """
    try:
        # SIGTERM and its like do what Ctrl-C does: an exception that lets everything be put away. But not under nohup.
        signums = [s for s in ENDING_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
        with handled(signal.default_int_handler, signums), contextlib.ExitStack() as stack:
            with signals_deferred():
                directory = stack.enter_context(private_folder())
            endpoints = ipc_endpoints(directory, config.num_tokenizer, config.engine.tp_size)
            specs = worker_specs(config, endpoints)
            supervisor = Supervisor(launcher, specs, config.heartbeat_timeout, config.restart_workers)
            stack.callback(supervisor.stop)
            supervisor.start()
            gc.disable()  # what imports make is no garbage, and would be walked over again and again
            # FastAPI and uvicorn take most of a second. An exception from a signal could be lost inside of an import.
            with signals_deferred():
                from minisgl.server.serve import serve_http
            gc.enable()
            supervisor.wait_ready()
            stack.callback(ignore_signals)  # none may stop the end of the workers half way
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return asyncio.run(serve_http(config, endpoints, supervisor, listener))
    except KeyboardInterrupt:
        return 130


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
