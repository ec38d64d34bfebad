"""The server of a replica: `python -m minisgl.cluster.child`. A line of JSON on its standard input says what it serves
and where; the end of its standard input, which comes with its parent's however that ends, is its own end."""

import contextlib
import json
import os
import sys
import threading

from minisgl.config.args import args_from_options
from minisgl.config.resolve import prepare
from minisgl.errors import ConfigError, MiniSGLError
from minisgl.processes.control import Launcher
from minisgl.server.launch import bind_port, run_server
from minisgl.utils.log import setup_logging

FAILED = "failed: "  # begins the last line of a server that could not start


def main() -> int:
    line = sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup_logging("server")
    try:
        host, options = json.loads(line)
        with contextlib.closing(bind_port(host, 0)) as listener:  # --host is the cluster's, and says who may come
            return run_server(prepare(args_from_options(options)), listener, Launcher())
    except MiniSGLError as error:
        print(f"{FAILED}{error}", flush=True)
        return 2 if isinstance(error, ConfigError) else 1


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # our own children end with us


if __name__ == "__main__":
    sys.exit(main())
