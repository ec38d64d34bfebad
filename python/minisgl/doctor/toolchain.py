"""Checks of what kernels need: torch, driver and GPUs, C++ library, compilers, optional packages.

torch and the packages are imported in child processes only, so one that crashes is a row of the table.
"""

import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from minisgl.config.device import MIN_ARCH, dotted
from minisgl.config.probe import PACKAGES, Capabilities
from minisgl.doctor.row import Row, ask

MIN_TORCH = (2, 11)
KERNEL_SECONDS = 300.0  # to compile one

_TORCH_PROBE = """
import json, torch
count, problem = torch.cuda.device_count() if torch.version.cuda else 0, ""
try:
    torch.zeros(1, device="cuda" if count else "cpu")
except Exception as error:
    problem = str(error).splitlines()[0]
print(json.dumps([torch.__version__, torch.version.cuda, torch.backends.cpu.get_cpu_capability(), count, problem]))
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


@dataclass(frozen=True, slots=True)
class TorchInfo:
    """What a child process that imported torch found; `error` when it could not.

    num_gpus: that torch sees. gpu_error: why it cannot use the first of them.
    """

    version: str = ""
    cuda: str | None = None
    cpu: str = ""
    num_gpus: int = 0
    gpu_error: str = ""
    error: str = ""


def probe_torch(python: str = sys.executable) -> TorchInfo:
    """Import torch in a child process and ask it."""
    answer = ask([python, "-c", _TORCH_PROBE], timeout=120)
    return TorchInfo(*json.loads(answer.out.splitlines()[-1])) if answer.ok else TorchInfo(error=answer.reason)


def check_torch(torch: TorchInfo) -> Row:
    """torch can be imported and is new enough."""
    if torch.error:
        return Row("torch", "fail", torch.error, "Install it again: pip install -c constraints.txt -e .")
    build = f"built for CUDA {torch.cuda}" if torch.cuda else "CPU build"
    detail = f"{torch.version}, {build}, CPU kernels: {torch.cpu}"
    if numbers(torch.version)[:2] < MIN_TORCH:
        return Row("torch", "fail", detail, f"Install torch {dotted(MIN_TORCH)} or newer.")
    return Row("torch", "ok", detail)


def check_driver(machine: Capabilities, torch: TorchInfo) -> Row:
    """The NVIDIA driver runs, and supports the CUDA version that torch was built for."""
    name = "NVIDIA driver"
    if not machine.driver:
        if "no NVIDIA driver" in machine.gpu_problem:
            return Row(name, "n/a", "none on this machine: the CPU engine is used")
        return Row(name, "fail", machine.gpu_problem, "Load or reinstall the driver, then restart.")
    newest = dotted(machine.driver_cuda)
    detail = f"driver {machine.driver}, up to CUDA {newest}"
    if torch.cuda and machine.driver_cuda[0] < numbers(torch.cuda)[0]:
        fix = f"Update the driver, or install a torch that is built for CUDA {newest} or older."
        return Row(name, "fail", f"{detail}, but torch is built for CUDA {torch.cuda}", fix)
    return Row(name, "ok", detail)


def check_gpus(machine: Capabilities, torch: TorchInfo) -> list[Row]:
    """Each GPU that CUDA_VISIBLE_DEVICES shows, and whether torch can use them."""
    if not machine.gpus:
        seen = bool(machine.driver)
        return [
            Row("GPUs", "warn" if seen else "n/a", machine.gpu_problem, "Set CUDA_VISIBLE_DEVICES." if seen else "")
        ]
    rows = []
    for gpu in machine.gpus:
        free, total = gpu.free_memory >> 30, gpu.total_memory >> 30
        detail = f"{gpu.name}, compute capability {dotted(gpu.arch)}, {free} of {total} GiB free"
        fix = f"{dotted(MIN_ARCH)} is needed: choose others with CUDA_VISIBLE_DEVICES." if gpu.arch < MIN_ARCH else ""
        rows.append(Row(f"GPU {gpu.index}", "warn" if fix else "ok", detail, fix))
    if not torch.cuda:
        fix = "Install a torch that is built for CUDA."
        rows.append(Row("GPUs", "warn", "torch is a CPU build", fix))
    elif torch.gpu_error or torch.num_gpus != len(machine.gpus):
        detail = torch.gpu_error or f"torch sees {torch.num_gpus} of {len(machine.gpus)}"
        rows.append(Row("GPUs", "fail", detail, "Update the driver and restart it; look at nvidia-smi."))
    return rows


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
    have, need = glibcxx(loaded), glibcxx(built_with)
    detail = f"{loaded}: up to GLIBCXX_{dotted(have)}"
    if need > have:
        fix = (
            "Update it (conda install -c conda-forge 'libstdcxx-ng>=13'), or start with "
            f"LD_PRELOAD={os.path.realpath(built_with)}"
        )
        return Row(name, "fail", f"{detail}, but what {built_with} builds asks for GLIBCXX_{dotted(need)}", fix)
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


def check_compiler(compiler: str | None, include: str = sysconfig.get_paths()["include"]) -> Row:
    """The C++ compiler is there, a library that it builds can be loaded and called, and it finds Python's headers."""
    name = "C++ compiler"
    if compiler is None:
        return Row(name, "warn", "none found", "Our kernels need one (apt install g++); torch alone is slow.")
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
    detail = f"{compiler}: {version[0]}; built and loaded a C++20 library"
    if not Path(include, "Python.h").is_file():
        fix = "Triton's kernels need it: install Python's headers (apt install python3-dev)."
        return Row(name, "warn", f"{detail}, but there is no {include}/Python.h", fix)
    return Row(name, "ok", detail)


def check_nvcc(machine: Capabilities, torch: TorchInfo) -> Row:
    """nvcc is of the CUDA version that torch was built for, and builds one of our kernels through TVM-FFI."""
    name, nvcc = "nvcc", machine.nvcc
    if nvcc is None:
        if not torch.cuda or not machine.gpus:
            return Row(name, "n/a", "not found; it is for GPUs")
        return Row(name, "warn", "not found", f"Install CUDA {torch.cuda}'s toolkit, or set CUDA_HOME to it.")
    release = re.search(r"release (\d+\.\d+)", ask([nvcc, "--version"]).out)
    detail = f"{nvcc}: CUDA {release[1] if release else '?'}"
    if torch.cuda and release and numbers(release[1])[0] != numbers(torch.cuda)[0]:
        fix = f"Install CUDA {torch.cuda}'s toolkit and set CUDA_HOME to it, or a torch for CUDA {release[1]}."
        return Row(name, "fail", f"{detail}, but torch is built for CUDA {torch.cuda}", fix)
    if not machine.gpus or "tvm_ffi" not in machine.packages:
        return Row(name, "ok", f"{detail}; built nothing without a GPU and apache-tvm-ffi")
    print("building a kernel with nvcc: about a minute, the first time", file=sys.stderr)
    build = f"from minisgl.kernel.jit import load_kernel; load_kernel('step', {machine.gpus[0].arch})"
    built = ask([sys.executable, "-c", build], timeout=KERNEL_SECONDS)
    if not built.ok:
        fix = "Check that nvcc supports the C++ compiler's version (nvcc -ccbin), ninja, and MINISGL_CACHE_DIR."
        return Row(name, "fail", f"{detail}: cannot build a kernel: {built.reason}", fix)
    return Row(name, "ok", f"{detail}; built and loaded a kernel")


def check_package(module: str, has_gpu: bool) -> Row:
    """One optional package. One that is installed and cannot be imported is a warning everywhere."""
    package, use = PACKAGES[module]
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
