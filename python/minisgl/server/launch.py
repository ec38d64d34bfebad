"""From a decided configuration to a running server, and back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from minisgl.config.runtime import Addresses, ServerConfig
from minisgl.errors import ConfigError
from minisgl.server.supervisor import Supervisor, WorkerSpec
from minisgl.server.workers import scheduler_main, tokenizer_main

MakeSpecs = Callable[[ServerConfig, Addresses], list[WorkerSpec]]


def worker_specs(config: ServerConfig, addresses: Addresses) -> list[WorkerSpec]:
    """The children of a server: a scheduler per rank, the detokenizer, and tokenizers if they have own processes."""
    specs = [
        WorkerSpec(
            f"minisgl-TP{rank}-scheduler", scheduler_main, (config.engine, config.scheduler, addresses, rank)
        )
        for rank in range(config.engine.tp_size)
    ]
    endpoints = {"minisgl-detokenizer-0": addresses.detokenizer}
    for index in range(addresses.num_tokenizer):
        endpoints[f"minisgl-tokenizer-{index}"] = addresses.tokenizer(index)
    for name, endpoint in endpoints.items():
        specs.append(WorkerSpec(name, tokenizer_main, (config.tokenizer, addresses, endpoint)))
    return specs


@contextmanager
def running_workers(
    config: ServerConfig, make_specs: MakeSpecs = worker_specs
) -> Iterator[tuple[Supervisor, Addresses]]:
    """All child processes of a server, ready; none is left afterwards. For HTTP and for the shell alike.

    Raises: ConfigError or WorkerDied when a child does not start.
    """
    directory = tempfile.mkdtemp(prefix="minisgl-")  # 0700, and short: socket paths end at some 107 bytes
    try:
        addresses = Addresses(directory=directory, num_tokenizer=config.num_tokenizer)
        supervisor = Supervisor(make_specs(config, addresses))
        try:
            supervisor.start()
            yield supervisor, addresses
        finally:
            supervisor.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run_server(config: ServerConfig, make_specs: MakeSpecs = worker_specs) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status: 0 after a clean stop, 1 when a worker died.

    Raises: ConfigError (a taken port, a child that cannot start), before anything listens.
    """
    with contextlib.closing(bind_port(config.host, config.port)) as listener, _sigterm_interrupts():
        try:
            with running_workers(config, make_specs) as (supervisor, addresses):
                # Imported while the children have started, not before: it takes most of a second.
                from minisgl.server.http import serve_http

                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                return asyncio.run(serve_http(config, addresses, supervisor, listener))
        except KeyboardInterrupt:
            return 130


def bind_port(host: str, port: int) -> socket.socket:
    """Take the TCP port, without listening yet. Raises: ConfigError naming host and port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        # Old connections in TIME_WAIT must not stop us; a second server that has not begun to listen must.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from None
    return listener


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """During start-up SIGTERM ends like Ctrl-C: by an exception that lets everything be put away."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
