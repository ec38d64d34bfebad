"""The one loader of C++ and CUDA sources: compiled on first use through TVM-FFI, kept in a cache on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)

CSRC = Path(__file__).parent / "csrc"
INCLUDE = CSRC / "include"
CPU = "cpu"  # the source whose functions run on the processor


def cache_dir() -> Path:
    """Where compiled kernels are kept: `MINISGL_CACHE_DIR`, or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisgl"
    return Path(os.environ.get("MINISGL_CACHE_DIR") or default) / "kernels"


def _sources(name: str) -> list[Path]:
    files = (f"{CPU}.cc", f"{CPU}_bindings.cc") if name == CPU else (f"{name}.cu",)
    return [CSRC / "src" / file for file in files]


@functools.cache
def _source_digest(name: str) -> str:
    """Changes with the kernel file and every header."""
    digest = hashlib.sha256()
    headers = INCLUDE.rglob("*.cuh") if name != CPU else (INCLUDE / "minisgl" / "cpu").glob("*.h")
    for path in [*_sources(name), *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load_kernel(name: str, arch: tuple[int, int], defines: Mapping[str, int | str] | None = None) -> Any:
    """The module of `csrc/src/NAME.cu` for a GPU of compute capability `arch`; its exported functions are attributes.

    Raises: ConfigError when it cannot be compiled, with the compiler's first error.
    """
    return _load(name, arch, tuple(sorted((defines or {}).items())))


@functools.cache
def _load(name: str, arch: tuple[int, int], defines: tuple[tuple[str, int | str], ...]) -> Any:
    try:
        import tvm_ffi
        from tvm_ffi import cpp
    except (ImportError, OSError) as error:  # OSError: a library that does not load
        raise ConfigError(f"CUDA kernels need the package apache-tvm-ffi ({error}); install minisgl[cuda]") from error
    target = f"{arch[0]}{arch[1]}" + ("a" if arch[0] >= 9 else "")
    flags = [
        "--use_fast_math",
        "--expt-relaxed-constexpr",
        *(["-DMINISGL_PDL"] if arch[0] >= 9 else []),
        *(f"-D{key}={value}" for key, value in defines),
    ]
    key = hashlib.sha256(repr((_source_digest(name), target, flags, tvm_ffi.__version__)).encode()).hexdigest()[:16]
    # The only way to tell it the architecture; otherwise it asks nvidia-smi for that of the first GPU.
    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = f"{arch[0]}.{target[len(str(arch[0])) :]}"
    try:
        directory = cache_dir() / f"{name}-{key}"
        directory.mkdir(parents=True, exist_ok=True)
        return cpp.load(
            f"minisgl_{name}",
            cuda_files=[str(CSRC / "src" / f"{name}.cu")],
            extra_cuda_cflags=flags,
            extra_include_paths=[str(INCLUDE)],
            build_directory=str(directory),
            backend="cuda",
        )
    except (RuntimeError, OSError) as error:
        logger.debug("the kernel %s cannot be compiled", name, exc_info=True)
        raise ConfigError(
            f"cannot compile the kernel {name} for sm_{target}: {_reason(error)}; see minisgl doctor (nvcc, C++ "
            "compiler), and MINISGL_CACHE_DIR for where kernels are kept"
        ) from error


@functools.cache
def load_cpu_kernels(flags: tuple[str, ...] = ("-march=native",)) -> Any:
    """The module of `csrc/src/cpu.cc`. flags: what the compiler may use of the processor.

    Raises: ConfigError when it cannot be compiled, with the compiler's first error.
    """
    try:
        import tvm_ffi
        from tvm_ffi import cpp
    except (ImportError, OSError) as error:
        raise ConfigError(f"the CPU kernels need the package apache-tvm-ffi ({error})") from error
    flags = ("-std=gnu++20", "-O3", "-pthread", *flags)
    key = hashlib.sha256(repr((_source_digest(CPU), flags, _processor(), tvm_ffi.__version__)).encode()).hexdigest()[
        :16
    ]
    try:
        directory = cache_dir() / f"{CPU}-{key}"
        if not directory.exists():
            logger.info("compiling the CPU kernels: once, some seconds")
        directory.mkdir(parents=True, exist_ok=True)
        return cpp.load(
            f"minisgl_{CPU}",
            cpp_files=[str(path) for path in _sources(CPU)],
            extra_cflags=list(flags),
            extra_ldflags=["-pthread"],
            extra_include_paths=[str(INCLUDE)],
            build_directory=str(directory),
        )
    except (RuntimeError, OSError) as error:
        logger.debug("the CPU kernels cannot be compiled", exc_info=True)
        raise ConfigError(
            f"cannot compile the CPU kernels: {_reason(error)}; see minisgl doctor (C++ compiler), or set "
            "MINISGL_DISABLE_CPU_KERNELS=1 to compute with torch, more slowly"
        ) from error


def _processor() -> str:
    """A cache may be shared by machines with other processors."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _reason(error: Exception) -> str:
    """The compiler's first error, or else the first line of what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
