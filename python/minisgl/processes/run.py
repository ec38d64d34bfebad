"""All worker processes of a server, from their start to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from minisgl.config.runtime import ServerConfig
from minisgl.processes.launcher import LocalLauncher, WorkerSpec
from minisgl.processes.signals import ignore_signals, signals_deferred, signals_raised
from minisgl.processes.supervisor import Supervisor
from minisgl.processes.workers import worker_specs
from minisgl.utils.folders import private_folder
from minisgl.utils.sockets import Endpoints, ipc_endpoints

MakeSpecs = Callable[[ServerConfig, Endpoints], list[WorkerSpec]]


def run_with_workers(
    use: Callable[[Supervisor, Endpoints], Coroutine[Any, Any, int]],
    config: ServerConfig,
    make_specs: MakeSpecs = worker_specs,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Use all worker processes of a server, when they are ready; none is left afterwards. For HTTP and for the shell
    alike. meanwhile: what to do while they start. Returns what `use` does, or 130 where a signal has ended it.

    Raises: ConfigError or WorkerDied when a worker does not start.
    """
    try:
        with signals_raised(), ExitStack() as stack:
            with signals_deferred():
                directory = stack.enter_context(private_folder())
            endpoints = ipc_endpoints(directory, config.num_tokenizer, config.engine.tp_size)
            specs = make_specs(config, endpoints)
            supervisor = Supervisor(LocalLauncher(), specs, config.heartbeat_timeout, config.restart_workers)
            stack.callback(supervisor.stop)
            supervisor.start()
            meanwhile()
            supervisor.wait_ready()
            stack.callback(ignore_signals)  # none may stop the end of the workers half way
            return asyncio.run(use(supervisor, endpoints))
    except KeyboardInterrupt:
        return 130
