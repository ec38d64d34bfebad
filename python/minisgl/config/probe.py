"""What this machine has, as far as decisions depend on it. No torch: the API server's process stays small."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import psutil

from minisgl.config.gpus import Gpu, probe_nvidia, torch_cuda
from minisgl.env import cache_dir

LIBRARIES_BYTES = 3 << 30  # of addresses, which `ulimit -v` counts, that a scheduler takes beside weights and cache
# Optional packages, by the name that is imported: what pip calls them, and what they are for.
PACKAGES = {
    "triton": ("triton", "Triton kernels"),
    "tvm_ffi": ("apache-tvm-ffi", "C++ kernels"),
    "flashinfer": ("flashinfer-python", "FlashInfer attention"),
    "sgl_kernel": ("sglang-kernel", "FlashAttention-3"),
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """num_cores: that this process may use. memory: bytes available to it. cpu_flags: as Linux names them."""

    num_cores: int
    memory: int
    cpu_flags: frozenset[str]
    gpus: tuple[Gpu, ...] = ()  # that CUDA_VISIBLE_DEVICES shows, in its order
    gpu_problem: str = "no NVIDIA driver on this machine"  # why there are none
    driver: str = ""  # version
    driver_cuda: tuple[int, int] = (0, 0)  # the newest CUDA that the driver runs
    torch_cuda: str | None = None  # the CUDA that torch is built for; None: a CPU build
    packages: frozenset[str] = frozenset()  # of PACKAGES, those that are installed
    nvcc: str | None = None  # path of the compiler
    cxx: str | None = None  # path of the C++ compiler
    has_compiled: bool = False  # CPU kernels in the cache

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether the CPU multiplies bfloat16 natively; elsewhere such products are far slower than float32's."""
        return bool(self.cpu_flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def probe() -> Capabilities:
    """Look at the machine. Takes some milliseconds, a few hundred where there are GPUs."""
    nvidia = probe_nvidia(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Capabilities(
        num_cores=num_cores(),
        memory=available_memory(),
        cpu_flags=cpu_flags(),
        gpus=nvidia.gpus,
        gpu_problem=nvidia.problem,
        driver=nvidia.driver,
        driver_cuda=nvidia.cuda,
        torch_cuda=torch_cuda(),
        packages=frozenset(name for name in PACKAGES if find_spec(name)),
        nvcc=_find_nvcc(),
        cxx=shutil.which(os.environ.get("CXX") or "c++"),
        has_compiled=any(cache_dir().glob("cpu-*.so")),
    )


def num_cores(root: str = "") -> int:
    """The affinity mask's, or what a control group's quota allows where that is less. root: of the files, for tests."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = _groups(root, "cpu.max", "cpu.cfs_quota_us cpu.cfs_period_us")
    return min([cores, *(max(1, quota // period) for quota, period in quotas)])


def available_memory(root: str = "") -> int:
    """Free memory, or what a control group or `ulimit -v` leaves where that is less. root: of the files, for tests."""
    available = [int(psutil.virtual_memory().available)]
    groups = _groups(root, "memory.max memory.current", "memory.limit_in_bytes memory.usage_in_bytes")
    available += [max(0, limit - used) for limit, used in groups]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        available.append(max(0, limit - LIBRARIES_BYTES))
    return min(available)


def _groups(root: str, *names: str) -> Iterator[tuple[int, int]]:
    """The two numbers in files of these names (version 2's, version 1's), of our control group and all above it."""
    for line in _read(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            leaf = Path(f"{root}/sys/fs/cgroup", controller, path.strip("/"))
            for folder, files in product((leaf, *leaf.parents), names):
                texts = " ".join(_read(f"{folder}/{file}") for file in files.split()).split()
                if len(texts) == 2 and all(map(str.isdecimal, texts)):
                    yield int(texts[0]), int(texts[1])


def cpu_flags() -> frozenset[str]:
    lines = (line for line in _read("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(home, "bin", "nvcc")
    return str(beside) if beside.is_file() else shutil.which("nvcc")


def _read(path: str) -> str:
    """A system file's text, or nothing where there is no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
