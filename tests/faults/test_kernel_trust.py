"""A library that somebody else has written, or could have, is not loaded: it is compiled again."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minisgl.kernel import jit
from tests.integration.test_kernel_cache import CALLS_OF_ONE_BUILD, Compiler, compiler, library, load, small_sources

__all__ = ["compiler", "small_sources"]
STRANGER = 54321


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR of the test's own, since the fallback is below it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a file or folder another user's: by chown where we may, else all others than it become ours."""
    if os.geteuid() == 0:
        return lambda path: os.chown(path, STRANGER, -1)
    real = os.lstat

    def strange(path: Path) -> None:
        def lstat(self: Path) -> os.stat_result:
            status = list(real(self))
            status[stat.ST_UID] = STRANGER if self == path else status[stat.ST_UID]
            return os.stat_result(status)

        monkeypatch.setattr(Path, "lstat", lstat)

    return strange


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("small_sources", "compiler")
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_made_is_for_us_alone_whatever_the_umask(caplog: pytest.LogCaptureFixture, umask: int) -> None:
    before = os.umask(umask)
    try:
        load(caplog)
    finally:
        os.umask(before)
    folder = library().parent
    assert (mode_of(folder), mode_of(folder.parent), mode_of(library())) == (0o700, 0o700, 0o644)
    assert load(caplog) == []


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize("mode", [0o777, 0o664, 0o666])
def test_a_library_that_others_can_write_is_made_again(
    compiler: Compiler, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    load(caplog)
    path = library()
    path.chmod(mode)
    told = load(caplog)
    assert told[0] == f"{path} is not loaded: it can be written by others, mode {mode:o}"
    assert told[-1].startswith("compiling the CPU kernels")
    assert mode_of(path) == 0o644
    assert load(caplog) == []
    assert compiler.num_calls() == 2 * CALLS_OF_ONE_BUILD


@pytest.mark.usefixtures("small_sources")
def test_a_library_of_another_user_is_made_again(
    compiler: Compiler, caplog: pytest.LogCaptureFixture, give_away: Callable[[Path], None]
) -> None:
    load(caplog)
    path = library()
    give_away(path)
    told = load(caplog)
    assert told[0] == f"{path} is not loaded: it belongs to user {STRANGER}"
    assert told[-1].startswith("compiling the CPU kernels")
    assert compiler.num_calls() == 2 * CALLS_OF_ONE_BUILD


@pytest.mark.usefixtures("small_sources")
def test_a_link_in_the_place_of_a_library_is_not_followed(
    compiler: Compiler, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    load(caplog)
    path = library()
    elsewhere = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(elsewhere)
    assert load(caplog)[0] == f"{path} is not loaded: it is a link"
    assert not path.is_symlink()
    assert compiler.num_calls() == 2 * CALLS_OF_ONE_BUILD


@pytest.mark.usefixtures("small_sources")
def test_a_folder_of_ours_that_others_can_write_is_closed(compiler: Compiler, caplog: pytest.LogCaptureFixture) -> None:
    """What is in it counts by its own owner and mode."""
    load(caplog)
    library().parent.chmod(0o777)
    assert load(caplog) == []
    assert mode_of(library().parent) == 0o755
    assert compiler.num_calls() == CALLS_OF_ONE_BUILD


@pytest.mark.usefixtures("small_sources")
def test_in_the_place_of_another_users_folder_one_of_our_own_is_used(
    compiler: Compiler, caplog: pytest.LogCaptureFixture, give_away: Callable[[Path], None], temporary: Path
) -> None:
    load(caplog)
    theirs = library()
    data = theirs.read_bytes()
    give_away(theirs.parent)
    for expected in (["the folder of kernels", "compiling the CPU"], ["the folder of kernels"]):
        told = load(caplog)
        assert [line[: len(start)] for line, start in zip(told, expected, strict=True)] == expected
        assert f"belongs to user {STRANGER}" in told[0]
    (ours,) = (temporary / f"minisgl-{os.geteuid()}" / "kernels").glob("*.so")
    assert mode_of(ours.parent) == 0o700
    assert theirs.read_bytes() == data
    assert compiler.num_calls() == 2 * CALLS_OF_ONE_BUILD


@pytest.mark.usefixtures("small_sources", "compiler")
def test_where_even_the_temporary_folder_is_taken_each_start_compiles(
    caplog: pytest.LogCaptureFixture, temporary: Path
) -> None:
    if os.geteuid():
        return  # nobody can take it from us then, but who is told apart by chown
    for folder in (jit.cache_dir(), temporary / "minisgl-0" / "kernels"):
        folder.mkdir(parents=True)
        os.chown(folder, STRANGER, -1)
    for _ in range(2):
        told = load(caplog)
        assert any("each start compiles" in line for line in told)
        assert any(line.startswith("compiling the CPU kernels") for line in told)
        assert not list(jit.cache_dir().glob("*.so"))


PLANTED = """
import sys
from pathlib import Path
from minisgl.kernel import jit
jit.CSRC = Path(sys.argv[1])
jit.load_cpu_kernels()
"""


def test_code_that_was_planted_never_runs(
    compiler: Compiler, small_sources: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A library with a right checksum, whose constructor leaves a trace; in a process of its own."""
    load(caplog)
    path, trace = library(), tmp_path / "trace"
    evil = tmp_path / "evil.c"
    evil.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fclose(fopen("{trace}", "w")); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "evil.so"), str(evil)], check=True, timeout=60)
    data = (tmp_path / "evil.so").read_bytes()
    path.unlink()
    path.write_bytes(data + jit.hashlib.sha256(data).digest())
    path.chmod(0o777)
    subprocess.run([sys.executable, "-c", PLANTED, str(jit.CSRC)], check=True, timeout=250)
    assert not trace.exists()
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(tmp_path / 'evil.so')!r})"], check=True)
    assert trace.exists()  # the trap works
    assert compiler.num_calls() >= 2 * CALLS_OF_ONE_BUILD
    assert small_sources.is_file()


@pytest.mark.usefixtures("small_sources", "compiler")
def test_old_libraries_go_when_there_are_many(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "MAX_KEPT", 3)
    load(caplog)
    first = library()
    for age in range(5):
        old = first.with_name(f"cpu-old-{age}.so")
        old.write_bytes(b"old")
        old.with_suffix(".lock").touch()
        os.utime(old, (1000 + age, 1000 + age))
    os.utime(first, (1, 1))
    load(caplog)  # it is used, and so the youngest
    built = first.with_name("cpu-new.so")
    source = first.with_name("built")
    source.write_bytes(first.read_bytes())
    jit.put_in_place(source, built)
    assert sorted(file.name for file in first.parent.glob("*.so")) == sorted([first.name, "cpu-new.so", "cpu-old-4.so"])


@pytest.mark.usefixtures("small_sources")
def test_threads_that_compile_at_the_same_time_do_not_disturb_one_another(compiler: Compiler) -> None:
    """As for a GPU, where a dozen kernels are made side by side: each begins and ends while others are at work."""
    compiler.delay(0.5)
    before = dict(os.environ)
    levels = list(jit.LEVELS)[:4]

    def compile_later(index: int) -> Path:
        time.sleep(0.4 * index)
        return jit.compile_cpu_kernels(levels[index])

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(compile_later, range(4)))
    assert all(path.is_file() for path in made)
    assert dict(os.environ) == before
    assert compiler.num_calls() == 4 * CALLS_OF_ONE_BUILD
