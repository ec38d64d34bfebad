"""The one loader of C++ and CUDA sources: compiled on first use through TVM-FFI, kept in a cache on disk.

A library's name has a digest of all that it is made of, and of nothing else: not of where the sources lie, so that
checkouts, wheels and images share it, nor of the compiler, so that a machine without one can load it. It is made in a
private folder and put into the cache whole, and what another user could have written is never loaded
(docs/adr/0011-kernel-cache.md, 0020).
"""

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from minisgl.config.probe import cpu_flags, find_nvcc, torch_cuda
from minisgl.env import cache_dir
from minisgl.errors import ConfigError
from minisgl.utils.process import private_folder

logger = logging.getLogger(__name__)
warn_once = functools.cache(logger.warning)  # each rank waits for some ten kernels

CSRC = Path(__file__).parent / "csrc"
CPU, MASKS = "cpu", "masks"
HOST = {CPU: ("cpu.cc", "cpu_bindings.cc"), MASKS: ("masks.cc",)}  # what runs on the processor, and its sources
LOCK_SECONDS = 300.0  # that one process waits for another's compiler
_DIGEST_BYTES = 32  # at the end of a library: of what stands before
MAX_KEPT = 256  # libraries: who needs another, takes the place of the one that was used least recently

# Whatever ends this process ends the compilers that it waits for: the system tells ninja, and ninja tells them.
_NINJA = """import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execvp("ninja", ["ninja", "-v"])
"""

# By name, the features and flags of each level of processors.
LEVELS: Mapping[str, Mapping[str, str]] = msgspec.yaml.decode((CSRC / "levels.yaml").read_bytes())


@functools.cache
def load_kernel(name: str, arch: tuple[int, int], **defines: int | str) -> Any:
    """The module of `csrc/src/NAME.cu` for a GPU of compute capability `arch`; its exported functions are attributes.

    Raises: ConfigError when it cannot be compiled, with the compiler's first error.
    """
    target = f"{arch[0]}{arch[1]}" + ("a" if arch[0] >= 9 else "")
    codes = [f"sm_{target}"] + [f"compute_{target}"] * (arch[0] < 9)  # the second one for newer cards
    flags = ["-std=c++17", "-O2", "-Xcompiler=-fPIC", *(f"-gencode=arch=compute_{target},code={c}" for c in codes)]
    flags += ["--use_fast_math", "--expt-relaxed-constexpr", *(f"-D{key}={defines[key]}" for key in sorted(defines))]
    flags += ["-DMINISGL_PDL"] * (arch[0] >= 9)
    cudart = (torch_cuda() or "").partition(".")[0]  # the library asks for that version of it
    return _library(name, f"sm_{target}", flags, cudart, _load)


def side_by_side(tasks: Iterable[Callable[[], object]]) -> None:
    """Compile several kernels at the same time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda task: task(), tasks))


@functools.cache
def load_cpu_kernels(target: str = "") -> Any:
    """The module of `csrc/src/cpu.cc`. target: of `LEVELS`, or what `-march` takes; by default this one's level.

    Raises: ConfigError when it cannot be compiled, with the compiler's first error.
    """
    return _cpu_library(target or cpu_level(), _load)


@functools.cache
def load_masks() -> Any:
    """The module of `csrc/src/masks.cc`. Raises: ConfigError as above."""
    return _library(MASKS, "host", ["-std=gnu++20", "-O2", "-fPIC", "-pthread"], platform.machine(), _load)


def compile_cpu_kernels(target: str) -> Path:
    """Have the CPU kernels in the cache, for other machines too. target: of `LEVELS`, or what `-march` takes."""
    return Path(_cpu_library(target, lambda path: path))


def cpu_level() -> str:
    """The best of `LEVELS` that this processor has; "native" for those that have none."""
    has = cpu_flags()
    return next((name for name, level in LEVELS.items() if set(level["features"].split()) <= has), "native")


def _cpu_library(target: str, use: Callable[[Path], Any]) -> Any:
    flags = LEVELS[target]["flags"].split() if target in LEVELS else [f"-march={target}"]
    machine = platform.machine()
    if target == "native":  # what the compiler then finds out itself: a cache may be shared with other processors
        machine += " ".join(sorted(cpu_flags())) or platform.processor()
    return _library(CPU, target, ["-std=gnu++20", "-O3", "-fPIC", "-pthread", *flags], machine, use)


def _load(path: Path) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


def _files(name: str) -> dict[str, bytes]:
    """What a library is made of: the contents of sources and headers, by their paths below `CSRC`."""
    include = CSRC / "include"
    headers = include.rglob("*.h") if name in HOST else [*include.rglob("*.cuh"), *include.glob("minisgl/*.h")]
    paths = [*(CSRC / "src" / source for source in HOST.get(name, (f"{name}.cu",))), *sorted(headers)]
    return {path.relative_to(CSRC).as_posix(): path.read_bytes() for path in paths}


def _library(name: str, target: str, flags: list[str], machine: str, use: Callable[[Path], Any]) -> Any:
    """What `use` makes of the library in the cache. It is compiled if it is not there, damaged, or does not load.

    Raises: ConfigError saying why it cannot be compiled.
    """
    title = f"the {'CPU kernels' if name == CPU else f'kernel {name}'} for {target}"
    try:
        import tvm_ffi

        files = _files(name)
        key = repr((sorted(files.items()), flags, machine, tvm_ffi.__version__))
        path = _folder() / f"{name}-{target}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if (found := _use_compiled(path, use, logging.DEBUG)) is not None:
            return found
        with _locked(path, title):  # by the time it is ours, another process may have made it
            found = _use_compiled(path, use, logging.WARNING)
            return found if found is not None else _use_new(name, title, files, flags, path, use)
    except (RuntimeError, OSError, ImportError) as error:  # OSError: TVM-FFI's own library does not load
        logger.debug("cannot compile %s", title, exc_info=True)
        hint = "or set MINISGL_DISABLE_CPU_KERNELS=1 to compute with torch, more slowly" if name == CPU else "and nvcc"
        reason = f"{_reason(error)}; see minisgl doctor, C++ compiler, {hint}"
        raise ConfigError(f"cannot compile {title}: {reason}") from error


def _use_compiled(path: Path, use: Callable[[Path], Any], level: int) -> Any | None:
    """level: of the log's line that says why a library that is there is not used."""
    try:
        if (why := _shared_because(path)) is not None:
            logger.warning("%s is not loaded: it %s", path, why)
            return None
        data = path.read_bytes()
        if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() == data[-_DIGEST_BYTES:]:
            with suppress(OSError):
                os.utime(path)
            return use(path)
        logger.log(level, "%s is damaged", path)  # to load half of a library would end the process
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (RuntimeError, OSError) as error:
        logger.log(level, "%s does not load here: %s", path, _reason(error))
    return None


def _use_new(
    name: str, title: str, files: dict[str, bytes], flags: list[str], path: Path, use: Callable[[Path], Any]
) -> Any:
    # Warnings are shown by the shell too, and by a program that has not set up logging.
    logger.warning("compiling %s: once, about %s", title, "half a minute" if name in HOST else "a minute")
    begin = time.perf_counter()
    with private_folder("minisgl-kernel-") as folder:
        built = _build(name, files, flags, Path(folder))
        data = built.read_bytes()
        built.write_bytes(data + hashlib.sha256(data).digest())
        logger.info("compiled %s in %.0f s", title, time.perf_counter() - begin)
        try:
            put_in_place(built, path)
        except OSError as error:
            reason = error.strerror or error
            logger.warning("%s cannot be kept, each start compiles: %s: %s (MINISGL_CACHE_DIR)", title, path, reason)
            return use(built)
        return use(path)


def _build(name: str, files: dict[str, bytes], flags: list[str], folder: Path) -> Path:
    """Compile copies of the sources in a folder, which may go when the library has been loaded.

    Raises: RuntimeError with what the compilers say.
    """
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    sources = [path for path in files if path.startswith("src/")]
    (folder / "build.ninja").write_text(_steps(name, sources, flags), encoding="utf-8")
    beside_python = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    environment = {**os.environ, "PATH": beside_python, "TMPDIR": str(folder)}
    command = [sys.executable, "-I", "-c", _NINJA]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).replace(str(folder), str(CSRC)))
    return folder / "library.so"


def _steps(name: str, sources: list[str], flags: list[str]) -> str:
    """A file for ninja: each source is compiled, and the library is linked of what comes of them."""
    from tvm_ffi import libinfo

    compiler = os.environ.get("CXX", "c++") if name in HOST else shlex.quote(find_nvcc() or "nvcc")
    flags = [*flags, "-Iinclude", f"-I{libinfo.find_include_path()}", f"-I{libinfo.find_dlpack_include_path()}"]
    link = ["-shared", "-pthread" if name in HOST else "-cudart=shared", libinfo.find_libtvm_ffi()]
    lines = [f"rule compile\n  command = {compiler} {shlex.join(flags)} -c $in -o $out"]
    lines += [f"rule link\n  command = {compiler} $in {shlex.join(link)} -o $out"]
    lines += [f"build {source}.o: compile {source}" for source in sources]
    return "\n".join([*lines, f"build library.so: link {' '.join(f'{source}.o' for source in sources)}", ""])


def put_in_place(built: Path, path: Path) -> None:
    """Whole or not at all, whoever else does the same. Raises: OSError also where others could change it."""
    if (why := _shared_because(path.parent.resolve())) is not None:
        raise PermissionError(f"the folder {why}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        copy = shutil.copy(built, folder)
        os.chmod(copy, 0o644)
        os.replace(copy, path)
    for old in sorted(path.parent.glob("*.so"), key=os.path.getmtime)[:-MAX_KEPT]:
        old.unlink(missing_ok=True)
        old.with_suffix(".lock").unlink(missing_ok=True)


def _folder() -> Path:
    """The cache's folder, made if need be; where others can write to it, one of our own in its place."""
    folder = cache_dir()
    own = Path(tempfile.gettempdir(), f"minisgl-{os.geteuid()}", "kernels")
    for place, instead in ((folder, f"{own} is used"), (own, "each start compiles")):
        with suppress(OSError):  # it is then found out, and said, when a library is to be kept there
            for path in (*reversed(place.parents), place):
                if not path.exists():
                    path.mkdir(0o700, exist_ok=True)
            status = place.stat()
            if status.st_uid == os.geteuid() and status.st_mode & 0o022:
                place.chmod(status.st_mode & 0o755)
            if (why := _shared_because(place.resolve())) is not None:
                logger.warning("the folder of kernels %s %s: %s", place, why, instead)
                continue
        return place
    return folder


def _shared_because(path: Path) -> str | None:
    """Why another user may have written a file or a folder, or can. Raises: FileNotFoundError."""
    status = path.lstat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}"
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    return f"can be written by others, mode {stat.S_IMODE(status.st_mode):o}" if status.st_mode & 0o022 else None


@contextmanager
def _locked(path: Path, title: str) -> Iterator[None]:
    """One process compiles, and others wait for it: not for ever, and not where a folder cannot be locked."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(path.with_suffix(".lock").open("a"))
            _wait_for(lock.fileno(), title)
        except OSError as error:
            logger.debug("no lock for %s: %s", path, error)
        yield


def _wait_for(lock: int, title: str) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            warn_once("waiting for another process, which compiles kernels")
            time.sleep(0.1)
    logger.warning("another process has been compiling %s for %.0f s: doing it here", title, LOCK_SECONDS)


def _reason(error: Exception) -> str:
    """The compiler's first error, or else the first line of what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error" in line or "not found" in line), lines[0])
