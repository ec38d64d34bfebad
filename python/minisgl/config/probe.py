"""What this machine has, as far as decisions depend on it. No torch: the API server's process stays small."""

import os
import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import psutil

from minisgl.env import cache_dir


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. index: as CUDA counts the visible ones in the bus's order. arch: compute capability. Memory in bytes."""

    index: int
    name: str
    arch: tuple[int, int]
    total_memory: int
    free_memory: int

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True, slots=True)
class Nvidia:
    """The driver's answers."""

    gpus: tuple[Gpu, ...] = ()  # that CUDA_VISIBLE_DEVICES shows, in its order
    driver: str = ""  # version
    driver_cuda: tuple[int, int] = (0, 0)  # the newest CUDA that the driver runs
    gpu_problem: str = "no NVIDIA driver on this machine"  # why there are none


def probe_nvidia(chosen: str | None) -> Nvidia:
    """Ask the driver, without a CUDA context. chosen: CUDA_VISIBLE_DEVICES, None where it is not set."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return Nvidia()
    except pynvml.NVMLError as error:
        return Nvidia(gpu_problem=f"the NVIDIA driver does not run ({error}); load or reinstall it")
    try:
        version: int = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        driver, cuda = str(pynvml.nvmlSystemGetDriverVersion()), (version // 1000, version % 1000 // 10)
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        indices = visible_devices([str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles], chosen)
        gpus = []
        for i, handle in enumerate(handles[index] for index in indices):
            memory, arch = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(Gpu(i, str(pynvml.nvmlDeviceGetName(handle)), tuple(arch), int(memory.total), int(memory.free)))
        hidden = f"CUDA_VISIBLE_DEVICES={chosen} shows none of this machine's {len(handles)} GPUs"
        problem = hidden if handles else "the NVIDIA driver sees no GPU"
        return Nvidia(tuple(gpus), driver, cuda, "" if gpus else problem)
    except pynvml.NVMLError as error:
        return Nvidia(gpu_problem=f"the NVIDIA driver does not answer ({error}); look at nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def visible_devices(uuids: Sequence[str], chosen: str | None) -> list[int]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES: numbers or beginnings of UUIDs, up to the first that is not there."""
    if chosen is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in (part.strip() for part in chosen.split(",")):
        fitting = (i for i, uuid in enumerate(uuids) if word and uuid.startswith(word))
        index = int(word) if word.isdecimal() else next(fitting, -1)
        if not 0 <= index < len(uuids) or index in found:
            break
        found.append(index)
    return found


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch is built for; None for a CPU build, or no torch."""
    spec = find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


LIBRARIES_BYTES = 3 << 30  # of addresses, which `ulimit -v` counts, that a scheduler takes beside weights and cache
# Optional packages, by the name that is imported: what pip calls them, and what they are for.
PACKAGES = {
    "triton": ("triton", "Triton kernels"),
    "tvm_ffi": ("apache-tvm-ffi", "C++ kernels"),
    "flashinfer": ("flashinfer-python", "FlashInfer attention"),
    "sgl_kernel": ("sglang-kernel", "FlashAttention-3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities(Nvidia):
    """num_cores: that this process may use. memory: bytes available to it. cpu_flags: as Linux names them."""

    num_cores: int
    memory: int
    cpu_flags: frozenset[str]
    torch_cuda: str | None = None  # the CUDA that torch is built for; None: a CPU build
    packages: frozenset[str] = frozenset()  # of PACKAGES, those that are installed
    nvcc: str | None = None  # path of the compiler
    cxx: str | None = None  # path of the C++ compiler
    has_compiled: bool = False  # CPU kernels in the cache


def probe() -> Capabilities:
    """Look at the machine. Takes some milliseconds, a few hundred where there are GPUs."""
    nvidia = probe_nvidia(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Capabilities(
        num_cores=num_cores(),
        memory=available_memory(),
        cpu_flags=cpu_flags(),
        **{field.name: getattr(nvidia, field.name) for field in fields(nvidia)},
        torch_cuda=torch_cuda(),
        packages=frozenset(name for name in PACKAGES if find_spec(name)),
        nvcc=find_nvcc(),
        cxx=shutil.which(os.environ.get("CXX") or "c++"),
        has_compiled=any(cache_dir().glob("cpu-*.so")),
    )


def find_nvcc() -> str | None:
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{cuda}/bin") or shutil.which("nvcc")


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


def _read(path: str) -> str:
    """A system file's text, or nothing where there is no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
