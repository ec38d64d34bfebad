"""Ctrl-C at a time of our choosing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C does nothing until the end of the block, or until what this yields is called inside.

    Then the handler that was there before runs, which raises KeyboardInterrupt unless the program has its own. Outside
    of the main thread, to which Ctrl-C does not come, and where it is ignored nothing changes.
    """
    handler, caught = signal.getsignal(signal.SIGINT), list[int]()

    def release() -> None:
        if caught and callable(handler):
            caught.clear()
            handler(signal.SIGINT, None)

    is_held = callable(handler) and threading.current_thread() is threading.main_thread()
    if is_held:
        signal.signal(signal.SIGINT, lambda signum, _: caught.append(signum))
    try:
        yield release
    finally:
        if is_held:
            signal.signal(signal.SIGINT, handler)
            release()
