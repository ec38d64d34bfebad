"""Threads beside those that serve."""

from __future__ import annotations

import os
import sys
import threading

_NICE = 10


def yield_to_others() -> None:
    """From now on this thread gets what the others leave of the cores. Elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
