"""Checks of what kernels need: torch, driver and GPUs, C++ library, compilers, optional backends.

torch and the backends are imported in child processes only, so one that crashes is a row of the table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from minisgl.doctor.row import Answer, Row, Status, ask

MIN_TORCH = (2, 11)
MIN_CAPABILITY = (7, 5)
# Import name, distribution and use of each optional backend.
BACKENDS = (
    ("tvm_ffi", "apache-tvm-ffi", "JIT-built kernels"),
    ("triton", "triton", "Triton attention and fused kernels"),
    ("flashinfer", "flashinfer-python", "FlashInfer attention"),
    ("sgl_kernel", "sgl-kernel", "FlashAttention-3"),
    ("flash_attn", "flash-attn", "FlashAttention"),
)

_TORCH_PROBE = """
import json, torch
count = torch.cuda.device_count() if torch.version.cuda else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "cpu": torch.backends.cpu.get_cpu_capability(),
    "gpus": [{"name": g.name, "capability": [g.major, g.minor], "memory": g.total_memory} for g in gpus],
    "archs": torch.cuda.get_arch_list() if torch.version.cuda else [],
}))
"""
_LIBSTDCXX_PROBE = """
import ctypes
ctypes.CDLL("libstdc++.so.6")
print(next(line.split()[-1] for line in open("/proc/self/maps") if "libstdc++.so" in line))
"""
_CPP_SOURCE = """
#include <cmath>
#include <string>
#include <vector>
extern "C" int minisgl_probe(int n) {
    std::vector<std::string> parts(n, "x");
    int total = 0;
    for (const auto &part : parts) total += static_cast<int>(std::sqrt(part.size() * 4.0));
    return total;
}
"""
_CUDA_SOURCE = "__global__ void scale(float *x) { x[threadIdx.x] *= 2.0f; }\n"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes


@dataclass(frozen=True, slots=True)
class TorchInfo:
    """What a child process that imported torch found; `error` when it could not."""

    version: str = ""
    cuda: str | None = None
    cpu: str = ""
    gpus: tuple[Gpu, ...] = ()
    archs: tuple[str, ...] = ()
    error: str = ""


def probe_torch(python: str = sys.executable) -> TorchInfo:
    """Import torch in a child process and ask it."""
    answer = ask([python, "-c", _TORCH_PROBE], timeout=120)
    if not answer.ok:
        return TorchInfo(error=answer.reason)
    found = json.loads(answer.out.splitlines()[-1])
    gpus = tuple(Gpu(gpu["name"], (gpu["capability"][0], gpu["capability"][1]), gpu["memory"]) for gpu in found["gpus"])
    return TorchInfo(found["version"], found["cuda"], found["cpu"], gpus, tuple(found["archs"]))


def check_torch(torch: TorchInfo) -> Row:
    """torch can be imported and is new enough."""
    if torch.error:
        return Row("torch", "fail", torch.error, "Install it again: pip install -c constraints.txt -e .")
    build = f"built for CUDA {torch.cuda}" if torch.cuda else "CPU build"
    detail = f"{torch.version}, {build}, CPU kernels: {torch.cpu}"
    if numbers(torch.version)[:2] < MIN_TORCH:
        return Row("torch", "fail", detail, f"Install torch {'.'.join(map(str, MIN_TORCH))} or newer.")
    return Row("torch", "ok", detail)


def ask_nvidia_smi() -> Answer | None:
    """nvidia-smi's table, or None on a machine that has no NVIDIA driver."""
    return ask(["nvidia-smi"], timeout=30) if shutil.which("nvidia-smi") else None


def check_driver(smi: Answer | None, torch: TorchInfo) -> Row:
    """The NVIDIA driver runs, and supports the CUDA version that torch was built for."""
    name = "NVIDIA driver"
    if smi is None:
        return Row(name, "n/a", "no NVIDIA driver on this machine: the CPU engine is used")
    if not smi.ok:
        return Row(name, "fail", f"nvidia-smi failed: {smi.reason}", "Load or reinstall the driver, then restart.")
    driver, cuda = _after("Driver Version:", smi.out), _after("CUDA Version:", smi.out)
    detail = f"driver {driver}, up to CUDA {cuda}"
    if torch.cuda and numbers(cuda) and numbers(cuda)[0] < numbers(torch.cuda)[0]:
        fix = f"Update the driver, or install a torch that is built for CUDA {cuda} or older."
        return Row(name, "fail", f"{detail}, but torch is built for CUDA {torch.cuda}", fix)
    return Row(name, "ok", detail)


def check_gpus(smi: Answer | None, torch: TorchInfo) -> Row:
    """GPUs that torch sees, and their compute capability."""
    name = "GPUs"
    if torch.gpus:
        parts = [f"{g.name} (sm_{g.capability[0]}{g.capability[1]}, {g.memory >> 30} GiB)" for g in torch.gpus]
        old = [g.name for g in torch.gpus if g.capability < MIN_CAPABILITY]
        if old:
            return Row(name, "warn", "; ".join(parts), f"{old[0]} is older than compute capability 7.5: not tested.")
        return Row(name, "ok", "; ".join(parts))
    if smi is None or not smi.ok:
        return Row(name, "n/a", "none")
    if not torch.cuda:
        return Row(name, "warn", "the driver runs, but torch is a CPU build", "Install a torch that is built for CUDA.")
    fix = "Check CUDA_VISIBLE_DEVICES, and that driver and torch agree on CUDA (rows above)."
    return Row(name, "fail", "the driver runs, but torch sees no GPU", fix)


def check_libstdcxx(loaded: str | None = None, built_with: str | None = None) -> Row:
    """The libstdc++ that Python loads has the symbols that the compiler's output will ask for.

    A Conda environment's libstdc++ that is older than the compiler's is the classic failure:
    "version `GLIBCXX_3.4.31' not found" when a JIT-built library is loaded.
    """
    name = "libstdc++"
    if loaded is None:
        answer = ask([sys.executable, "-c", _LIBSTDCXX_PROBE])
        if not answer.ok:
            return Row(name, "fail", f"Python cannot load it: {answer.reason}", "Install libstdc++6 (libstdcxx-ng).")
        loaded = answer.out.strip()
    if built_with is None:
        compiler = find_compiler()
        built_with = ask([compiler, "-print-file-name=libstdc++.so.6"]).out.strip() if compiler else ""
    have = glibcxx(loaded)
    detail = f"{loaded}: up to GLIBCXX_{_dotted(have)}"
    need = glibcxx(built_with)
    if need > have:
        fix = (
            "Update it (conda install -c conda-forge 'libstdcxx-ng>=13'), or start with "
            f"LD_PRELOAD={os.path.realpath(built_with)}"
        )
        return Row(name, "fail", f"{detail}, but what {built_with} builds asks for GLIBCXX_{_dotted(need)}", fix)
    return Row(name, "ok", detail)


def glibcxx(library: str) -> tuple[int, ...]:
    """The newest GLIBCXX symbol version that a library defines; () when it cannot be read."""
    try:
        data = Path(library).read_bytes()
    except OSError:
        return ()
    return max((numbers(match.decode()) for match in re.findall(rb"\0GLIBCXX_([0-9.]+)(?=\0)", data)), default=())


def find_compiler() -> str | None:
    """The C++ compiler that kernels are built with: $CXX, or the first of c++, g++, clang++."""
    chosen = os.environ.get("CXX")
    candidates = [chosen.split()[0]] if chosen else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def check_compiler(compiler: str | None) -> Row:
    """The C++ compiler is there, and a library that it builds can be loaded and called from Python."""
    name = "C++ compiler"
    if compiler is None:
        return Row(name, "warn", "none found", "Kernels in C++ need one (apt install g++); the sdpa backend does not.")
    version = ask([compiler, "--version"]).out.splitlines() or ["?"]
    with tempfile.TemporaryDirectory(prefix="minisgl-doctor-") as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_CPP_SOURCE)
        built = ask([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)])
        if not built.ok:
            fix = "Install a compiler with C++20: GCC 11 or Clang 14 and newer (apt install g++)."
            return Row(name, "fail", f"{version[0]}: cannot build: {built.reason}", fix)
        call = f"import ctypes; assert ctypes.CDLL({str(library)!r}).minisgl_probe(3) == 6"
        run = ask([sys.executable, "-c", call])
    if not run.ok:
        return Row(name, "fail", f"{version[0]}: builds, but {run.reason}", "See the row of libstdc++.")
    return Row(name, "ok", f"{compiler}: {version[0]}; built and loaded a C++20 library")


def check_headers(include: str | None = None) -> Row:
    """Python's headers, which some JIT-built extensions include."""
    include = include or sysconfig.get_paths()["include"]
    if Path(include, "Python.h").is_file():
        return Row("Python headers", "ok", include)
    return Row("Python headers", "warn", f"no Python.h in {include}", "Install them (apt install python3-dev).")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(home, "bin", "nvcc")
    return str(beside) if beside.is_file() else shutil.which("nvcc")


def check_nvcc(nvcc: str | None, torch: TorchInfo) -> Row:
    """nvcc builds a kernel, and is of the CUDA version that torch was built for."""
    name = "nvcc"
    if nvcc is None:
        if not torch.cuda:
            return Row(name, "n/a", "not found, and torch is a CPU build")
        return Row(name, "warn", "not found", f"Install CUDA {torch.cuda}'s toolkit, or set CUDA_HOME.")
    release = re.search(r"release (\d+\.\d+)", ask([nvcc, "--version"]).out)
    detail = f"{nvcc}: CUDA {release[1] if release else '?'}"
    if torch.cuda and release and numbers(release[1])[0] != numbers(torch.cuda)[0]:
        fix = f"Install CUDA {torch.cuda}'s toolkit and set CUDA_HOME to it, or a torch for CUDA {release[1]}."
        return Row(name, "fail", f"{detail}, but torch is built for CUDA {torch.cuda}", fix)
    with tempfile.TemporaryDirectory(prefix="minisgl-doctor-") as folder:
        source = Path(folder, "probe.cu")
        source.write_text(_CUDA_SOURCE)
        built = ask([nvcc, "-c", str(source), "-o", str(source.with_suffix(".o"))], timeout=120)
    if not built.ok:
        status: Status = "fail" if torch.gpus else "warn"
        fix = "Check that nvcc supports the C++ compiler's version (nvcc -ccbin), and its installation."
        return Row(name, status, f"{detail}: cannot build a kernel: {built.reason}", fix)
    return Row(name, "ok", f"{detail}; built a kernel")


def check_backends(torch: TorchInfo) -> list[Row]:
    """Each optional backend: importable, and if not, why."""
    return [check_backend(module, package, use, bool(torch.gpus)) for module, package, use in BACKENDS]


def check_backend(module: str, package: str, use: str, has_gpu: bool) -> Row:
    """One optional backend. One that is installed and cannot be imported is a warning everywhere."""
    version = f"import importlib.metadata as m; print(m.version({package!r}))"
    probe = (
        f"import importlib.util as u, sys\nif u.find_spec({module!r}) is None: sys.exit(77)\nimport {module}\n{version}"
    )
    answer = ask([sys.executable, "-c", probe], timeout=120)
    if answer.ok:
        return Row(module, "ok", f"{answer.out.strip()} ({use})")
    if answer.code != 77:
        fix = f"pip install --upgrade {package}, or remove it."
        return Row(module, "warn", f"installed, but cannot be imported: {answer.reason}", fix)
    if has_gpu:
        return Row(module, "warn", f"not installed ({use})", f"Optional: pip install {package}")
    return Row(module, "n/a", f"not installed ({use})")


def numbers(version: str) -> tuple[int, ...]:
    """The leading dotted numbers of a version: "2.13.0+cpu" is (2, 13, 0); () when there are none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "?"


def _after(label: str, text: str) -> str:
    match = re.search(re.escape(label) + r"\s*(\S+)", text)
    return match[1] if match else "?"
