"""Which GPUs there are, asked of the driver's management library, and which CUDA torch is built for. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


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
    """The driver's answers. cuda: the newest CUDA that it runs. problem: why there are no GPUs."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    problem: str = ""


def probe_nvidia(chosen: str | None) -> Nvidia:
    """Ask the driver, without a CUDA context. chosen: CUDA_VISIBLE_DEVICES, None where it is not set."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return Nvidia(problem="no NVIDIA driver on this machine")
    except pynvml.NVMLError as error:
        return Nvidia(problem=f"the NVIDIA driver does not run ({error}); load or reinstall it")
    try:
        version: int = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        driver, cuda = str(pynvml.nvmlSystemGetDriverVersion()), (version // 1000, version % 1000 // 10)
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        indices = visible_devices([str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles], chosen)
        gpus = []
        for i, handle in enumerate(handles[index] for index in indices):
            memory, arch = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(Gpu(i, str(pynvml.nvmlDeviceGetName(handle)), tuple(arch), int(memory.total), int(memory.free)))
        problem = "" if gpus else "the NVIDIA driver sees no GPU"
        if handles and not gpus:
            problem = f"CUDA_VISIBLE_DEVICES={chosen} shows none of this machine's {len(handles)} GPUs"
        return Nvidia(tuple(gpus), driver, cuda, problem)
    except pynvml.NVMLError as error:
        return Nvidia(problem=f"the NVIDIA driver does not answer ({error}); look at nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def visible_devices(uuids: Sequence[str], chosen: str | None) -> list[int]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES: numbers or beginnings of UUIDs, up to the first that is not there."""
    if chosen is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in (part.strip() for part in chosen.split(",")):
        if word.isdecimal():
            index = int(word)
        else:
            index = next((i for i, uuid in enumerate(uuids) if word and uuid.startswith(word)), -1)
        if not 0 <= index < len(uuids) or index in found:
            break
        found.append(index)
    return found


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch is built for; None for a CPU build, or no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return parse_torch_cuda(Path(spec.origin).with_name("version.py").read_text())


def parse_torch_cuda(version_py: str) -> str | None:
    """The same, from the text of torch/version.py."""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version_py, re.MULTILINE)
    return match[1] if match else None
