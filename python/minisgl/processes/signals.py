"""The signals that end processes: the supervisor's to its children, and those from outside to the main process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNAL = signal.SIGUSR1  # from the supervisor
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # from outside, to the parent


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that end us wait until the end of the block. A child that is half started would complain about them.

    Children are born with them blocked, so that a Ctrl-C during their first moments is the parent's to handle.
    """
    caught: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signum in ENDING_SIGNALS:
            handlers[signum] = signal.signal(signum, lambda number, _: caught.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        for number in caught[:1]:
            signal.raise_signal(number)


@contextmanager
def signals_raised() -> Iterator[None]:
    """SIGTERM and its like do what Ctrl-C does: an exception that lets everything be put away. Restored at the end."""
    signums = [s for s in ENDING_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]  # nohup
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore_signals() -> None:
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
