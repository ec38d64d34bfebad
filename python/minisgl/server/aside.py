"""Work that would keep an event loop waiting, in a thread beside it."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_SWITCH_SECONDS = 0.001  # that the thread may keep the loop waiting, where that is up to Python


class Aside:
    """One thread, which does one thing after the other."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        sys.setswitchinterval(_SWITCH_SECONDS)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """What the function returns, or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, _uncollected, function, arguments)


def _uncollected(function: Callable[..., T], arguments: tuple[object, ...]) -> T:
    """Python would look for garbage in a million new lists again and again, and everybody waits for that."""
    gc.disable()
    try:
        return function(*arguments)
    finally:
        gc.enable()
