"""The cache of compiled kernels: what is in it is never compiled again, what is broken in it is, and who waits is told.

A compiler of our own on the PATH counts how often it is called. The sources are a few lines; where they are
the real ones, nothing is compiled.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.errors import ConfigError
from minisgl.kernel import cuda, decode_gemm, jit, skinny
from minisgl.kernel.__main__ import main as prebuild

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "minisgl"
SOURCE = "int one() { return 1; }\n"
CALLS_OF_ONE_BUILD = 3  # two sources, and the linker
SCRIPT = """#!/bin/sh
echo "$@" >> "{log}"
sleep {delay}
exec {cxx} $(printf '%s\\n' "$@" | sed s/^-O3$/-O1/)
"""
PROGRAM = """
import torch
from minisgl.kernel.cpu import CpuOps
ops = CpuOps(1)
assert ops.matrix(torch.ones(2, 4)).apply(torch.ones(1, 4)).tolist() == [[4.0, 4.0]]
"""
# Of the sources in the folder that it is given.
SMALL_PROGRAM = """
import pathlib, sys
from minisgl.kernel import jit
jit.CSRC = pathlib.Path(sys.argv[1])
jit.load_cpu_kernels()
"""


class Compiler:
    """`c++` on a PATH of its own. It takes `delay` seconds longer than the real one."""

    def __init__(self, folder: Path) -> None:
        self.path, self._log, self._real = folder / "bin", folder / "calls", shutil.which("c++")
        self.path.mkdir()
        self.delay(0.0)
        self._log.touch()

    def delay(self, seconds: float) -> None:
        compiler = self.path / "c++"
        compiler.write_text(SCRIPT.format(log=self._log, delay=seconds, cxx=self._real))
        compiler.chmod(0o755)

    def num_calls(self) -> int:
        return len(self._log.read_text().splitlines())


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library of the real sources, in the cache that all tests use. It is asked for before `compiler`."""
    return jit.compile_cpu_kernels(jit.cpu_level())


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """And an empty cache."""
    compiler = Compiler(tmp_path)
    monkeypatch.setenv("PATH", f"{compiler.path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path / "cache"))
    return compiler


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In place of the real ones."""
    folder = tmp_path / "csrc"
    (folder / "include").mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / "src" / "cpu.cc").write_text(SOURCE)
    (folder / "src" / "cpu_bindings.cc").write_text("int two() { return 2; }\n")
    monkeypatch.setattr(jit, "CSRC", folder)
    yield folder / "src" / "cpu.cc"
    forget()


def forget() -> None:
    """What a process remembers."""
    jit.load_cpu_kernels.cache_clear()
    jit.warn_once.cache_clear()


def load(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Load the CPU kernels as a new process does. Returns what a terminal is told."""
    forget()
    caplog.clear()
    jit.load_cpu_kernels()
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def run(program: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    """On stderr, by a process that must succeed."""
    try:
        errors = process.communicate(timeout=250)[1]
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return errors


def library() -> Path:
    (file,) = jit.cache_dir().glob("*.so")
    return file


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Where a wheel of this checkout has been installed."""
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "python" / "minisgl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=250)
    (file,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(file).extractall(tmp_path / "installed")
    return tmp_path / "installed"


def test_two_checkouts_and_a_wheel_share_one_library(
    compiled: Path, compiler: Compiler, tmp_path: Path, wheel: Path
) -> None:
    """The real sources, as they lie in installations of every kind, however old and wherever they are: what this
    checkout has compiled is found by all of them."""
    jit.cache_dir().mkdir(parents=True, mode=0o700)
    shutil.copy(compiled, jit.cache_dir())
    checkout = tmp_path / "second checkout"
    shutil.copytree(PACKAGE, checkout / "minisgl", ignore=shutil.ignore_patterns("__pycache__"))
    assert said(run(PROGRAM, PYTHONPATH=str(checkout))) == ""
    for file in checkout.rglob("csrc/**/*"):
        os.utime(file)
    moved = checkout.rename(tmp_path / "moved")
    other = {"HOME": str(tmp_path), "CXX": "/usr/bin/false", "LANG": "C"}
    third = [run(PROGRAM, PYTHONPATH=str(place), **other) for place in (moved, wheel)]
    assert [said(process) for process in third] == ["", ""]
    assert compiler.num_calls() == 0


def test_what_is_compiled_otherwise_is_another_library(
    compiler: Compiler, small_sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sources and headers count; the old library stays for whoever has the old sources."""
    header = jit.CSRC / "include" / "more.h"
    load(caplog)
    small_sources.write_text('#include "more.h"\n')
    header.write_text(SOURCE)
    load(caplog)
    header.write_text(SOURCE.replace("1", "3"))
    load(caplog)
    header.unlink()
    small_sources.write_text(SOURCE)
    assert load(caplog) == []
    assert compiler.num_calls() == 3 * CALLS_OF_ONE_BUILD


def test_programs_that_start_together_compile_once(compiler: Compiler, small_sources: Path) -> None:
    compiler.delay(1.0)
    processes = [run(SMALL_PROGRAM, jit.CSRC) for _ in range(2)]
    texts = [said(process) for process in processes]
    assert compiler.num_calls() == CALLS_OF_ONE_BUILD
    first = re.compile(r"compiling the CPU kernels for \S+: once, about half a minute")
    assert sum(first.match(text) is not None for text in texts) == 1
    assert all(text == "" or text.startswith(("compiling the", "waiting for another process")) for text in texts)


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "another"])
@pytest.mark.usefixtures("small_sources")
def test_a_damaged_library_is_compiled_again(compiler: Compiler, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    """To load half of a library would end the process by a signal, without a word."""
    load(caplog)
    data = library().read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    cases = {"half": data[:middle], "empty": b"", "flipped": flipped, "another": b"no library" * 9}
    path = library()
    path.unlink()  # it is loaded here: to write into it would be felt
    path.write_bytes(cases[damage])
    told = load(caplog)
    assert told[0] == f"{path} is damaged"
    assert told[1].startswith("compiling the CPU kernels")
    assert load(caplog) == []
    assert compiler.num_calls() == 2 * CALLS_OF_ONE_BUILD


def test_a_library_that_does_not_load_here_is_compiled_again(
    compiler: Compiler, small_sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when another machine's compiler asked for a newer libstdc++."""
    small_sources.write_text("extern int nowhere;\nint one() { return nowhere; }\n")
    with pytest.raises(ConfigError, match=r"CPU kernels for .*nowhere.*minisgl doctor"):  # nor does it load when new
        load(caplog)
    broken = library().rename(jit.cache_dir() / "broken")
    small_sources.write_text(SOURCE)
    forget()
    good = jit.compile_cpu_kernels(jit.cpu_level())  # and not loaded
    broken.replace(good)
    told = load(caplog)
    assert told[0].startswith(f"{good} does not load here: ")
    assert told[1].startswith("compiling the CPU kernels")
    assert load(caplog) == []


@pytest.mark.usefixtures("small_sources", "compiler")
def test_a_compiler_that_hangs_elsewhere_is_not_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(caplog)
    path = library()
    path.unlink()
    monkeypatch.setattr(jit, "LOCK_SECONDS", 0.5)
    with path.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = load(caplog)
    assert told[0].startswith("waiting for another process")
    assert told[1].startswith("another process has been compiling the CPU kernels")
    assert told[2].startswith("compiling the CPU kernels")
    assert path.is_file()


@pytest.mark.parametrize("place", ["a file", "under a file", "read-only"])
@pytest.mark.usefixtures("small_sources", "compiler")
def test_a_cache_that_cannot_be_written_costs_time_and_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    places = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "deeper", "read-only": Path("/proc")}
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(places[place]))
    for _ in range(2):
        told = load(caplog)
        assert len(told) == 2
        assert told[0].startswith("compiling the CPU kernels")
        assert re.search(f"cannot be kept, each start compiles: {places[place]}.*(MINISGL_CACHE_DIR)", told[1])


@pytest.mark.usefixtures("small_sources")
def test_the_kernels_of_an_image_are_found_by_the_machine_that_runs_it(
    compiler: Compiler, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """`python -m minisgl.kernel prebuild LEVEL …`, then a processor of that level."""
    forget()
    levels = dict.fromkeys([jit.cpu_level(), *list(jit.LEVELS)[-1:]])
    assert prebuild(["prebuild", *levels]) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, jit.cache_dir().glob("*.so")))
    assert load(caplog) == []
    assert compiler.num_calls() == len(levels) * CALLS_OF_ONE_BUILD
    for wrong in (["prebuild", "x86-64-v9"], ["build"]):
        with pytest.raises(ConfigError, match="expected"):
            prebuild(wrong)


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("avx2 fma f16c bmi1 bmi2 movbe abm", "x86-64-v3"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx_vnni", "x86-64-v3-vnni"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v4"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni", "x86-64-v4-vnni"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512_vnni", "x86-64-v3"),  # the first machines of it
        ("sse4_2 avx", "native"),
        ("asimd fphp", "native"),
    ],
)
def test_levels(monkeypatch: pytest.MonkeyPatch, flags: str, level: str) -> None:
    monkeypatch.setattr(jit, "cpu_flags", lambda: frozenset(flags.split()))
    assert jit.cpu_level() == level


@pytest.mark.parametrize(("arch", "dtype", "is_there"), [
    ((9, 0), torch.bfloat16, True), ((9, 0), torch.float32, False), ((8, 0), torch.bfloat16, False)
])  # fmt: skip
def test_all_of_a_gpus_kernels_are_compiled_at_once(
    arch: tuple[int, int], dtype: torch.dtype, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router's, too, which no small step asks for: a request would wait for its compiler."""
    loaded = list[tuple[str, Any]]()
    for module in (cuda, decode_gemm, skinny):
        monkeypatch.setattr(module, "load_kernel", lambda name, arch, **defines: loaded.append((name, defines)))
    for module, name in ((decode_gemm, "is_available"), (decode_gemm, "prepare"), (skinny, "prepare")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, getattr(function, "__wrapped__", function))  # nothing is remembered
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: arch)
    monkeypatch.setattr(skinny, "shared_memory", lambda _: 227)
    cuda.compile_kernels(torch.device("cuda", 0), dtype)
    assert (("norm_router", {"MINISGL_FP16": 0}) in loaded) == is_there
    assert {name for name, _ in loaded} >= {*cuda.KERNELS}
