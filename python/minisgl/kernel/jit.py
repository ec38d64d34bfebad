"""The one loader of C++ and CUDA sources: compiled on first use through TVM-FFI, kept in a cache on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)

CSRC = Path(__file__).parent / "csrc"
INCLUDE = CSRC / "include"


def cache_dir() -> Path:
    """Where compiled kernels are kept: `MINISGL_CACHE_DIR`, or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisgl"
    return Path(os.environ.get("MINISGL_CACHE_DIR") or default) / "kernels"


@functools.cache
def _source_digest(name: str) -> str:
    """Changes with the kernel file and every header."""
    digest = hashlib.sha256()
    for path in [CSRC / "src" / f"{name}.cu", *sorted(INCLUDE.rglob("*.cuh"))]:
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


def _reason(error: Exception) -> str:
    """The compiler's first error, or else the first line of what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
