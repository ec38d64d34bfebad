"""Child processes import their parent's script, so one without a `__main__` guard starts again in each."""

from __future__ import annotations

import multiprocessing
import os

CHILD_PREFIX = "minisgl-"  # of the names of all our child processes
UNGUARDED = 113  # exit status of a child that has come to where its parent started it


def end_if_spawned() -> None:
    """End this process if it is one of our children; the parent, which sees the status, says why."""
    if multiprocessing.current_process().name.startswith(CHILD_PREFIX):
        os._exit(UNGUARDED)
