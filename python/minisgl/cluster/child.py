"""The server of a replica: `python -m minisgl.cluster.child PARENT`. JSON on its standard input says at which address
it is and what it serves. It ends with the thread that started it, however that ends."""

import contextlib
import ctypes
import json
import os
import signal
import sys

from minisgl.config.args import args_from_options
from minisgl.config.resolve import prepare
from minisgl.errors import MiniSGLError
from minisgl.processes.control import PR_SET_PDEATHSIG, Launcher
from minisgl.server.launch import bind_port, run_server
from minisgl.utils.log import setup_logging


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a process that was stopped ends, too
    if os.getppid() != int(sys.argv[1]):
        return 1  # it ended before
    host, options = json.load(sys.stdin)
    setup_logging("server")
    try:
        with contextlib.closing(bind_port(host, 0)) as listener:  # --host is the cluster's, and says who may come
            return run_server(prepare(args_from_options(options)), listener, Launcher())
    except MiniSGLError as error:
        print(error, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
