"""The server of a replica: `python -m minisgl.cluster.child`. A line of JSON on its standard input says what it serves
and where; the end of its standard input, which comes with its parent's however that ends, is its own end."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from dataclasses import replace

from minisgl.cluster.events import publishing_main
from minisgl.config.args import args_from_options
from minisgl.config.resolve import prepare
from minisgl.errors import ConfigError, MiniSGLError
from minisgl.processes.launcher import LocalLauncher, Worker, WorkerSpec
from minisgl.processes.workers import scheduler_main
from minisgl.server.launch import bind_port, run_server
from minisgl.utils.log import setup_logging

FAILED = "failed: "  # begins the last line of a server that could not start


class PublishingLauncher(LocalLauncher):
    """The scheduler of rank 0 publishes what becomes of its prefix cache. published: see `publishing_main`."""

    def __init__(self, published: tuple[str, str]) -> None:
        self._published = published

    def start(self, spec: WorkerSpec, life: int, is_lasting: bool) -> Worker:
        if spec.body is scheduler_main and spec.args[-1] == 0:
            spec = replace(spec, body=publishing_main, args=(*spec.args, self._published))
        return super().start(spec, life, is_lasting)


def main() -> int:
    line = b""
    while not line.endswith(b"\n"):
        if not (part := os.read(0, 65536)):
            return 1
        line += part
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told = json.loads(line)
    setup_logging("server")
    try:
        args = args_from_options(told["options"])
        with contextlib.closing(bind_port(told["host"], 0)) as listener:
            return run_server(prepare(args), listener, PublishingLauncher(tuple(told["published"])))
    except MiniSGLError as error:
        print(f"{FAILED}{error}", flush=True)
        return 2 if isinstance(error, ConfigError) else 1


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # our own children end with us


if __name__ == "__main__":
    sys.exit(main())
