"""Faults on purpose, in processes that have `tests/faults/inject` on PYTHONPATH and a folder in FAULTS.

A fault is a file in that folder, named WORKER.POINT (`TP0.step`, `detokenizer-0.message`), with an action and its
argument in it. The first worker that passes the point takes the file away and does what it says: once. The points are
functions of the package, which are wrapped when their modules are imported. docs/reliability.md lists them.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any


def fault(point: str) -> str | None:
    """Pass a point where something may be made to fail. None, unless what happens is the caller's to do: then its name.

    Actions: `raise error|engine|memory`, `wait FILE` (until it is there), `hang` (for ever, holding no lock), `stop`
    (SIGSTOP), `kill` (SIGKILL), `exit`. All others are returned, with their argument.
    """
    if (folder := os.environ.get("FAULTS")) is None:
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
        from minisgl.errors import EngineError

        raise {"error": RuntimeError, "engine": EngineError, "memory": MemoryError}[argument](f"injected at {point}")
    if action in ("wait", "hang"):
        while action == "hang" or not os.path.exists(argument):
            time.sleep(0.05)
    elif action in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
    elif action == "exit":
        os._exit(1)
    else:
        return text
    return None


@functools.cache
def _role() -> str:
    """The name of this process in the log: TP0, tokenizer-0, detokenizer-0; `server` for the main process."""
    name = multiprocessing.current_process().name
    return name.removeprefix("minisgl-").removesuffix("-scheduler") if name.startswith("minisgl-") else "server"


Wrapper = Callable[..., Any]


def _before(point: str) -> Callable[[Wrapper], Wrapper]:
    """Pass the point, then call the function."""

    def wrapped(function: Wrapper) -> Wrapper:
        def call(*args: Any, **options: Any) -> Any:
            fault(point)
            return function(*args, **options)

        return call

    return wrapped


def _beat(beat: Wrapper) -> Wrapper:
    quiet_until = 0.0

    def call(control: Any) -> None:
        nonlocal quiet_until
        if (action := fault("beat")) is not None:
            quiet_until = time.monotonic() + float(action.removeprefix("drop "))
        if time.monotonic() >= quiet_until:
            beat(control)

    return call


def _plan(plan: Wrapper) -> Wrapper:
    def call(planner: Any) -> Any:
        if (planned := plan(planner)) is not None:
            _record(planned.plan)
            fault("turn")
            if (how := fault("pages")) is not None:
                _damage(planner, how)
        return planned

    return call


def _record(plan: Any) -> None:
    """For those who compare what ranks have planned: a line for each plan, in a file of this worker."""
    if (folder := os.environ.get("RECORD_PLANS")) is not None:
        with open(os.path.join(folder, f"{_role()}.plans"), "a", encoding="utf-8") as file:
            file.write(f"{(plan.step_id, plan.page_updates, plan.reqs)!r}\n")


def _damage(planner: Any, how: str) -> None:
    pages = planner.pages
    if how == "exhaust":
        pages.allocator.allocate(pages.allocator.num_free)
    elif how == "free":
        pages.allocator.free(planner.running[0].pages[-1:])
    else:
        pages.cache.num_evictable += 1


def _sample(sample: Wrapper) -> Wrapper:
    def call(runner: Any, logits: Any, *args: Any) -> Any:
        if (planted := fault("logits")) is not None:
            logits[int(planted.removeprefix("nan "))] = float("nan")
        return sample(runner, logits, *args)

    return call


def _send(send: Wrapper) -> Wrapper:
    def call(socket: Any, messages: Sequence[object]) -> None:
        if messages and type(messages[0]).__name__ == "DetokenizeMsg":
            fault("send")
        send(socket, messages)

    return call


POINTS: dict[str, list[tuple[str, Callable[[Wrapper], Wrapper]]]] = {
    "minisgl.processes.control": [("setup_logging", _before("start")), ("Control.beat", _beat)],
    "minisgl.scheduler.planner": [("Planner.plan", _plan)],
    "minisgl.kvcache.pages": [("PageAllocator.allocate", _before("allocate"))],
    "minisgl.engine.step": [("StepRunner.launch", _before("step")), ("StepRunner._sample", _sample)],
    "minisgl.message.sockets": [("PushSocket.send", _send)],
    "minisgl.tokenizer.server": [("TokenizerServer.handle", _before("message"))],
    "minisgl.tokenizer.tokenize": [("Tokenizer.encode", _before("prompt"))],
}


# What is given up by the clock, where a test is about processor time: PATIENT makes it wait for longer than that takes.
CLOCKS = {"minisgl.grammar.store": {"TRIAL_SECONDS": 250.0}}


class Injector(importlib.abc.MetaPathFinder):
    """Wraps the functions of a module as soon as it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in POINTS and name not in CLOCKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def wrap(module: ModuleType) -> None:
    for constant, value in CLOCKS.get(module.__name__, {}).items() if "PATIENT" in os.environ else ():
        setattr(module, constant, value)
    for where, wrapper in POINTS.get(module.__name__, ()):
        *owner, function = where.split(".")
        place = functools.reduce(getattr, owner, module)
        setattr(place, function, wrapper(getattr(place, function)))


def inject() -> None:
    """In a process that was forked, some modules are there already."""
    for name in {*POINTS, *CLOCKS} & {*sys.modules}:
        wrap(sys.modules[name])
    sys.meta_path.insert(0, Injector())
