"""The HTTP server's life: it listens when everything is ready, drains, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn

from minisgl.config.runtime import Addresses, ServerConfig
from minisgl.env import env_bool, env_number
from minisgl.errors import WorkerDied
from minisgl.server.access import guarded
from minisgl.server.api_server import create_app
from minisgl.server.exposition import Exposition
from minisgl.server.frontend import Frontend
from minisgl.server.launch import call_in
from minisgl.server.supervisor import Supervisor

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 0.5  # for the last errors to reach the clients
KEEP_ALIVE_SECONDS = 60


class HttpServer(uvicorn.Server):
    """uvicorn on a socket that is bound already.

    The first SIGTERM or Ctrl-C closes the port and lets requests in flight finish, for `drain` seconds at most; the
    second ends them at once. When a worker is gone for good, they end with an error and the server follows: `status`
    is 1 then.
    """

    def __init__(self, config: uvicorn.Config, frontend: Frontend, drain: float, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.status = 0
        self._frontend = frontend
        self._drain = drain
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal again at the end."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self.on_signal)
        yield

    def on_signal(self) -> None:
        loop = asyncio.get_running_loop()
        if self.should_exit:
            self._end_requests()
            loop.call_later(NOTICE_SECONDS, self._exit, True)
            return
        if self._frontend.num_streams:
            logger.info("stopping; %d requests may finish, for %g s", self._frontend.num_streams, self._drain)
        self.should_exit = True
        self._frontend.refuse(WorkerDied("the server is shutting down"))
        loop.call_later(self._drain, self._end_requests)

    def on_death(self, error: WorkerDied) -> None:
        if self.should_exit:
            return
        logger.error("%s; the server stops", error)
        self.status = 1
        self._frontend.fail(error)
        loop = asyncio.get_running_loop()
        loop.call_later(NOTICE_SECONDS, self._exit)
        loop.call_later(2 * NOTICE_SECONDS, self._exit, True)

    def _end_requests(self) -> None:
        self._frontend.fail(WorkerDied("the server is shutting down"))

    def _exit(self, force: bool = False) -> None:
        self.should_exit, self.force_exit = True, force or self.force_exit


async def serve_http(
    config: ServerConfig, addresses: Addresses, supervisor: Supervisor, listener: socket.socket
) -> int:
    """Serve on `listener` until a signal or a dead worker ends it. Returns the exit status."""
    drain = env_number("MINISGL_DRAIN_TIMEOUT", 10, low=0, high=86400)
    loop = asyncio.get_running_loop()
    async with Frontend(addresses) as frontend:
        exposition = Exposition(config.served_model_name, frontend.metrics, supervisor.num_restarts)
        app = create_app(frontend, config, exposition)
        uvicorn_config = uvicorn.Config(
            guarded(app, config.access, exposition.count_http, log=env_bool("MINISGL_ACCESS_LOG", True)),
            http="h11",  # whatever else is installed: this one's limits and answers are tested
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # else anybody may say where a request comes from
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(drain) + 5,
            ssl_certfile=config.access.ssl_certfile,
            ssl_keyfile=config.access.ssl_keyfile,
        )
        server = HttpServer(uvicorn_config, frontend, drain, lambda: _announce(config, listener))
        supervisor.watch(partial(call_in, loop, server.on_death), partial(call_in, loop, frontend.on_change))
        await server.serve(sockets=[listener])
        return server.status


def _announce(config: ServerConfig, listener: socket.socket) -> None:
    address, port = listener.getsockname()[:2]
    if not (config.access.api_keys or ipaddress.ip_address(address.partition("%")[0]).is_loopback):
        logger.warning("--host %s without --api-key: whoever can reach port %d may use this server", config.host, port)
    host = f"[{config.host}]" if ":" in config.host else config.host
    scheme = "https" if config.access.ssl_certfile else "http"
    print(f"minisgl serves {config.served_model_name} at {scheme}://{host}:{port}/v1", flush=True)
