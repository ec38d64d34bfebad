"""What this machine has, as far as decisions depend on it. No torch: the API server's process stays small."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Capabilities:
    """num_cores: that this process may use. memory: bytes available to it. cpu_flags: as Linux names them."""

    num_cores: int
    memory: int
    cpu_flags: frozenset[str]

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether the CPU multiplies bfloat16 natively; elsewhere such products are far slower than float32's."""
        return bool(self.cpu_flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def probe() -> Capabilities:
    """Look at the machine."""
    return Capabilities(num_cores=_num_cores(), memory=_available_memory(), cpu_flags=_cpu_flags())


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_memory() -> int:
    """Free memory, or what the control group leaves where that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return available if limit == "max" else min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        return available


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())
