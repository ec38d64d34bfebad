"""Faults on purpose, for tests and for those who change the code. Off unless MINISGL_FAULTS names a folder.

A fault is a file in that folder, named WORKER.POINT (`TP0.step`, `detokenizer-0.message`), with an action and its
argument in it. The first worker that passes the point takes the file away and does what it says: once. Move a complete
file into the folder, rather than write it there. docs/reliability.md lists the points.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from contextlib import suppress

from minisgl.errors import EngineError

_RAISED: dict[str, type[Exception]] = {"error": RuntimeError, "engine": EngineError, "memory": MemoryError}


def fault(point: str) -> str | None:
    """Pass a point where something may be made to fail. None, unless what happens is the caller's to do: then its name.

    Actions: `raise error|engine|memory`, `sleep SECONDS`, `hang` (for ever, holding no lock), `stop` (SIGSTOP), `kill`
    (SIGKILL), `exit`. All others are returned, with their argument.
    """
    if (folder := _folder()) is None:
        return None
    path = os.path.join(folder, f"{_role()}.{point}")
    taken = f"{path}.taken-{os.getpid()}-{time.monotonic_ns()}"
    with suppress(FileNotFoundError):
        os.rename(path, taken)
        with open(taken, encoding="utf-8") as file:
            return _act(file.read().strip(), point)
    return None


def _act(text: str, point: str) -> str | None:
    action, _, argument = text.partition(" ")
    if action == "raise":
        raise _RAISED[argument](f"injected at {point}")
    if action in ("sleep", "hang"):
        time.sleep(float(argument or 1e9))
    elif action in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
    elif action == "exit":
        os._exit(1)
    else:
        return text
    return None


@functools.cache
def _folder() -> str | None:
    return os.environ.get("MINISGL_FAULTS") or None


@functools.cache
def _role() -> str:
    """The name of this process in the log: TP0, tokenizer-0, detokenizer-0; `server` for the main process."""
    name = multiprocessing.current_process().name
    return name.removeprefix("minisgl-").removesuffix("-scheduler") if name.startswith("minisgl-") else "server"
