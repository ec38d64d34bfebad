"""Runs a program of this folder, which may call no other machine: `python -m tests.clients.offline NAME ARGUMENTS`.

What a library sends home, or would fetch, ends the program with the name of that host.
"""

from __future__ import annotations

import os
import runpy
import sys

HERE = {None, "", "localhost", "127.0.0.1", "::1"}


def refuse_others(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE:
        print(f"it calls {host}", file=sys.stderr, flush=True)
        os._exit(1)  # an exception would be caught by what calls home


if __name__ == "__main__":
    sys.addaudithook(refuse_others)
    del sys.argv[0]
    runpy.run_module(f"tests.clients.{sys.argv[0]}", run_name="__main__", alter_sys=True)
