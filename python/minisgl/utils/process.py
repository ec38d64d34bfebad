"""What a process has of its own: a private folder, Ctrl-C at a time of its choosing, and whether it is a child."""

import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from minisgl.errors import ConfigError

_PARENT = re.compile(r"[\w./+-]{1,70}", re.ASCII)  # the path of a Unix socket ends at some 107 bytes


@contextmanager
def private_folder(prefix: str = "minisgl-") -> Iterator[str]:
    """A new folder that nobody else may enter (0700), fit for sockets. It is gone after the block; where its process is
    killed, the next one removes it, since nobody holds the lock in it any more. prefix: begins with "minisgl-".

    Raises: ConfigError when there can be none."""
    with ExitStack() as stack:
        try:
            parent = tempfile.gettempdir() if _PARENT.fullmatch(tempfile.gettempdir()) else "/tmp"
            _remove_stale(parent)
            stack.callback(_remove_stale, parent)  # those of children that were killed
            made = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
            folder = stack.enter_context(made)
            owner = stack.enter_context(open(f"{folder}/new", "wb"))
            fcntl.flock(owner, fcntl.LOCK_EX)
            os.rename(f"{folder}/new", f"{folder}/owner")
        except OSError as error:
            raise ConfigError(f"TMPDIR: no folder of our own can be made there: {error}") from None
        yield folder


def _remove_stale(parent: str) -> None:
    for stale in Path(parent).glob("minisgl-*/owner"):
        with suppress(OSError):
            if os.lstat(stale.parent).st_uid != os.getuid():
                continue  # and it is not opened: what another user puts there may be a pipe, which waits for ever
            with stale.open("rb") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale.parent)


@contextmanager
def handled(handler: Callable[[int, Any], object], signums: Iterable[int]) -> Iterator[None]:
    """Until the end of the block these signals are handled so, then as before. In the main thread only."""
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C does nothing until the end of the block, or until what this yields is called inside.

    Then the handler that was there before runs, which raises KeyboardInterrupt unless the program has its own. Outside
    of the main thread, to which Ctrl-C does not come, and where it is ignored nothing changes."""
    handler, caught = signal.getsignal(signal.SIGINT), list[int]()

    def release() -> None:
        if caught and callable(handler):
            caught.clear()
            handler(signal.SIGINT, None)

    is_held = callable(handler) and threading.current_thread() is threading.main_thread()
    try:
        with handled(lambda signum, _: caught.append(signum), [signal.SIGINT] if is_held else ()):
            yield release
    finally:
        release()


CHILD_PREFIX = "minisgl-"  # of the names of all our child processes
UNGUARDED = 113  # exit status of a child that has come to where its parent started it


def end_if_spawned() -> None:
    """End this process if it is one of our children; the parent, which sees the status, says why."""
    if multiprocessing.current_process().name.startswith(CHILD_PREFIX):
        os._exit(UNGUARDED)
