"""Waiting for what other processes and threads do: with a long deadline, since a busy machine takes its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil


def poll(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until it holds: however busy the machine is, it does so at some time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def still_running(processes: Iterable[psutil.Process], seconds: float = 20) -> list[psutil.Process]:
    """Those that still run after so many seconds. What has ended, and waits for the machine's first process to take
    note of it, does not run."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
