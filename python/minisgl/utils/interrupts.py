"""Ctrl-C at a time of our choosing."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class HeldInterrupts:
    """A context in which Ctrl-C does nothing until it ends, or until `release` is called inside.

    Then the handler that was there before runs, which raises KeyboardInterrupt unless the program has its own. Outside
    of the main thread, to which Ctrl-C does not come, and where it is ignored nothing changes.
    """

    def __init__(self) -> None:
        self._handler: Any = None  # while held, the one from before
        self._is_pending = False

    def __enter__(self) -> HeldInterrupts:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(self, *exc_info: object) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
            self._raise(handler)

    def release(self) -> None:
        if self._handler is not None:
            self._raise(self._handler)

    def _hold(self, _signum: int, _frame: FrameType | None) -> None:
        self._is_pending = True

    def _raise(self, handler: Any) -> None:
        is_pending, self._is_pending = self._is_pending, False
        if is_pending:
            handler(signal.SIGINT, None)
