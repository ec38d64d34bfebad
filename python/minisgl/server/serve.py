"""The HTTP server's life: it listens when everything is ready, drains, and ends."""

import asyncio
import contextlib
import errno
import functools
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import uvicorn

from minisgl.config.runtime import AccessConfig, ServerConfig
from minisgl.env import env_bool
from minisgl.errors import MiniSGLError, WorkerDied
from minisgl.message.sockets import Endpoints
from minisgl.processes.control import ENDING_SIGNALS
from minisgl.processes.supervisor import Supervisor
from minisgl.server.access import guarded
from minisgl.server.admission import http_config
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition
from minisgl.server.routes.app import create_app

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 0.5  # for the last errors to reach the clients
LINGER_SECONDS = 1.0  # that the port stays open when all requests have ended, and then connections do
MAX_CONNECTIONS, MAX_ACCEPTS = 4096, 16  # the latter in one round of the event loop
SEND_BUFFER = 2**15  # bytes of an answer that the kernel keeps for a client, or twice as many


class Work(Protocol):
    """What an HTTP server has to end before it does."""

    @property
    def num_in_flight(self) -> int: ...

    def refuse(self, error: MiniSGLError) -> None: ...

    def fail(self, error: MiniSGLError) -> None: ...


class HttpServer(uvicorn.Server):
    """uvicorn on a socket that is bound already. told: called when it listens.

    The first signal refuses new work and lets requests in flight finish, for `drain_timeout` seconds at most; the port
    is open until then, and a moment longer, so that clients and load balancers are told rather than cut off. The second
    ends all at once. When a worker is gone for good, requests end with an error and the server follows; `status` is 1.
    """

    def __init__(
        self, http: uvicorn.Config, work: Work, listener: socket.socket, drain_timeout: float, told: Callable[[], None]
    ) -> None:
        super().__init__(http)
        self.status = 0
        self._work, self._listener, self.drain_timeout, self._told = work, listener, drain_timeout, told
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listener.listen(MAX_CONNECTIONS)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        gc.freeze()  # a full collection walks over nothing that imports have made: 0.1 s in which no token is sent
        self._told()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal again at the end."""
        loop, is_ours = asyncio.get_running_loop(), threading.current_thread() is threading.main_thread()
        for signum in ENDING_SIGNALS if is_ours else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, self.on_signal)
        yield

    def on_signal(self) -> None:
        loop = asyncio.get_running_loop()
        if self._draining is not None or self.should_exit:
            self._end_requests()
            loop.call_later(NOTICE_SECONDS, self._exit, True)
            return
        if num_requests := self._work.num_in_flight:
            logger.info("stopping; %d requests may finish, for %g s", num_requests, self.drain_timeout)
        self._work.refuse(WorkerDied("the server is draining: it takes no new requests, and will stop"))
        self._draining = loop.create_task(self._drain())

    async def _drain(self) -> None:
        """Nothing is closed under a request: a client learns from its next answer that its connection is the last."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.drain_timeout
        self.config.encoded_headers.append((b"connection", b"close"))
        await self.on_tick(0)  # which makes the headers of requests to come
        for connection in self.server_state.connections:
            if (cycle := getattr(connection, "cycle", None)) is not None:
                cycle.default_headers = self.server_state.default_headers
        while self._work.num_in_flight and loop.time() < end:
            await asyncio.sleep(0.05)
        self._end_requests()
        await asyncio.sleep(LINGER_SECONDS)
        loop.remove_reader(self._listener)
        await asyncio.sleep(0.01)  # asyncio drops whom it is about to take in when the port is closed
        await asyncio.wait([self._close_port()], timeout=LINGER_SECONDS)
        close_idle = loop.time() + LINGER_SECONDS
        while self.server_state.connections and loop.time() < close_idle:
            await asyncio.sleep(0.05)
        self.should_exit = True
        await asyncio.sleep(max(1.0, end - loop.time()))  # for clients to take what is theirs
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _close_port(self) -> asyncio.Future[Any]:
        """Take in all who are in the kernel's queue, and close the port at that moment: nobody is cut off."""
        loop, config = asyncio.get_running_loop(), self.config
        queue: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while True:
                queue.append(self._listener.accept()[0])
        self.servers[0].close()
        protocol: Any = config.http_protocol_class
        make = functools.partial(protocol, config, self.server_state, self.lifespan.state)
        accepted = (loop.connect_accepted_socket(make, connection, ssl=config.ssl) for connection in queue)
        return asyncio.gather(*accepted, return_exceptions=True)

    def on_death(self, error: WorkerDied) -> None:
        self._work.fail(error)
        if self.should_exit or self._draining is not None:
            return
        logger.error("%s; the server stops", error)
        self.status = 1
        loop = asyncio.get_running_loop()
        loop.call_later(NOTICE_SECONDS, self._exit)
        loop.call_later(2 * NOTICE_SECONDS, self._exit, True)

    def _end_requests(self) -> None:
        self._work.fail(WorkerDied("the server is shutting down"))

    def _exit(self, force: bool = False) -> None:
        self.should_exit, self.force_exit = True, force or self.force_exit


async def serve_http(
    config: ServerConfig, endpoints: Endpoints, supervisor: Supervisor, listener: socket.socket
) -> int:
    """Serve on `listener` until a signal or a dead worker ends it. Returns the exit status."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrors())
    async with Frontend(endpoints) as frontend:
        exposition = Exposition(config.served_model_name, frontend.metrics, supervisor.num_restarts)
        app = create_app(frontend, config, exposition, supervisor.silent)
        limit, access = max_connections(), config.access
        guard = guarded(app, access, exposition.count_http, log=env_bool("MINISGL_ACCESS_LOG", True))
        files: dict[str, Any] = {"ssl_certfile": access.ssl_certfile, "ssl_keyfile": access.ssl_keyfile}
        uvicorn_config = http_config(guard, limit, backlog=MAX_ACCEPTS if limit > 64 else 2, **files)
        told = functools.partial(announce, config.served_model_name, config.host, access, listener)
        server = HttpServer(uvicorn_config, frontend, listener, config.drain_timeout, told)
        supervisor.watch(*(functools.partial(_call_in, loop, call) for call in (server.on_death, frontend.on_change)))
        await server.serve(sockets=[listener])
        return server.status


def announce(what: str, host: str, access: AccessConfig, listener: socket.socket) -> None:
    """Say what is served, and where."""
    address, port = listener.getsockname()[:2]
    if not (access.api_keys or ipaddress.ip_address(address.partition("%")[0]).is_loopback):
        logger.warning("--host %s without --api-key: whoever can reach port %d may use this server", host, port)
    scheme, shown = "https" if access.ssl_certfile else "http", f"[{host}]" if ":" in host else host
    print(f"minisgl serves {what} at {scheme}://{shown}:{port}/v1", flush=True)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """From another thread, call the function in the loop, unless that has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


class LoopErrors:
    """In place of asyncio's handler, which tells some thousand times a second that no descriptor is left."""

    _quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > self._quiet_until:
            self._quiet_until = loop.time() + 10
            logger.error("no descriptor is left (ulimit -n): who connects now has to wait until others have gone")


def max_connections(each: int = 1) -> int:
    """What the limit of descriptors leaves, raised as far as it may be. each: descriptors that a connection takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft if hard == resource.RLIM_INFINITY else min(hard, 2 * MAX_CONNECTIONS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    left = max(soft, wanted) - len(os.listdir("/dev/fd"))
    # ZeroMQ ends the process when it has none left for a worker that connects: those that are refused count too.
    return max(1, min(MAX_CONNECTIONS, (left - max(24, min(64, left // 2))) // each))
