"""Servers in environments that are not as they should be: they serve, or say in one line why not."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from minisgl.config import probe
from tests.e2e.conftest import START_SECONDS
from tests.faults.conftest import Server, real

Start = Callable[..., Server]
SHADOWED = (
    "torch",
    "psutil",
    "zmq",
    "uvicorn",
    "yaml",
    "numpy",
    "msgspec",
    "transformers",
    "pickle",
    "socket",
    "llguidance",
)
LONG = "x" * 90


@pytest.fixture
def try_in(tiny_path: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server after shell commands, `before`; {folder} in them is the test's own. It computes with torch, since
    nothing has to be compiled then. It never says a traceback."""
    started: list[Server] = []

    def run(before: str = "true", redirect: str = "", **env: str) -> Server:
        log = tmp_path / "log"
        command = shlex.join([sys.executable, *real(tiny_path)])
        script = f"{before.format(folder=tmp_path)} && exec {command} {redirect}"
        env = {name: value.format(folder=tmp_path) for name, value in env.items()}
        server = Server.__new__(Server)
        server.log, server.url, server.children = log, "", []
        environment = {**os.environ, "MINISGL_DISABLE_CPU_KERNELS": "1", **env}
        with log.open("wb") as output:
            server.process = subprocess.Popen(
                ["bash", "-c", script], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path
            )
        started.append(server)
        return server

    yield run
    for server in started:
        server.close()
        assert "Traceback" not in server.output()


def serves(server: Server) -> None:
    server.wait_ready()
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    server.process.terminate()
    assert server.wait_exit() == 0


def refuses(server: Server, *words: str) -> None:
    assert server.wait_exit() in (1, 2)
    last = server.output().splitlines()[-1]
    assert last.startswith("minisgl: error: ")
    assert all(word in last for word in words), last


@pytest.mark.parametrize(
    ("before", "env"),
    [
        ("ulimit -n 64 && mkdir {folder}/gone && cd {folder}/gone && rmdir {folder}/gone", {"HOME": "/proc/nobody"}),
        (f"mkdir -p {{folder}}/{LONG}", {"TMPDIR": f"{{folder}}/{LONG}"}),
    ],
    ids=["no-directory-no-home-few-descriptors", "long-tmp"],
)
def test_odd_environments_that_work(try_in: Callable[..., Server], before: str, env: dict[str, str]) -> None:
    serves(try_in(before, **env))


def test_closed_streams(try_in: Callable[..., Server], tmp_path: Path) -> None:
    """Nothing of ours may take their numbers: what is written to them would go there."""
    server = try_in(redirect="<&- >&- 2>&-")
    parent = psutil.Process(server.process.pid)
    port, deadline = 0, time.monotonic() + START_SECONDS
    while not port and time.monotonic() < deadline and server.process.poll() is None:
        listening = [c for c in parent.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        port = listening[0].laddr.port if listening else 0
        time.sleep(0.1)
    assert port
    assert {os.readlink(f"/proc/{parent.pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
    for child in parent.children(recursive=True):
        assert {os.readlink(f"/proc/{child.pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    server.process.terminate()
    assert server.wait_exit() == 0


def test_nothing_is_imported_from_the_working_directory(try_in: Callable[..., Server], tmp_path: Path) -> None:
    """Where names of files are odd, too."""
    for name in SHADOWED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    serves(try_in("mkdir -p '{folder}/ü #%' ", TMPDIR="{folder}/ü #%", LC_ALL="C", LANG="C"))
    assert not (tmp_path / "ran").exists()


def test_too_little_address_space_is_one_line(try_in: Callable[..., Server]) -> None:
    refuses(try_in("ulimit -v 1000000"), "memory")


def machine(root: Path, groups: str, files: dict[str, object]) -> str:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return str(root)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"memory.max": 100 << 20, "memory.current": 30 << 20}, 70),
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max", "a/b/memory.current": 1, "a/memory.max": 64 << 20, "a/memory.current": 0},
            64,
        ),
        ("0::/host/path\n", {"memory.max": 50 << 20, "memory.current": 60 << 20}, 0),
        (
            "5:memory:/a/b\n0::/\n",
            {
                "memory/a/b/memory.limit_in_bytes": 90 << 20,
                "memory/a/b/memory.usage_in_bytes": 10 << 20,
                "memory/a/memory.limit_in_bytes": 40 << 20,
                "memory/a/memory.usage_in_bytes": 15 << 20,
                "memory/memory.limit_in_bytes": 2**63 - 4096,
                "memory/memory.usage_in_bytes": 10**9,
            },
            25,
        ),
    ],
    ids=["v2", "v2-nested", "v2-over", "v1-nested"],
)
def test_memory_of_control_groups(tmp_path: Path, groups: str, files: dict[str, object], expected: int) -> None:
    assert probe.available_memory(machine(tmp_path, groups, files)) == expected << 20


def test_cores_of_control_groups(tmp_path: Path) -> None:
    assert (
        probe.num_cores(
            machine(tmp_path / "a", "0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"})
        )
        == 1
    )
    old = {"cpu/a/cpu.cfs_quota_us": 50000, "cpu/a/cpu.cfs_period_us": 100000}
    assert probe.num_cores(machine(tmp_path / "b", "3:cpu,cpuacct:/a\n", old)) == 1
    unlimited = {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100000}
    assert probe.num_cores(machine(tmp_path / "c", "3:cpu,cpuacct:/a\n", unlimited)) == probe.num_cores(str(tmp_path))


def test_ulimit_v_counts(tmp_path: Path) -> None:
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({6 << 30}, {6 << 30}))\n"
        "from minisgl.config.probe import available_memory\n"
        f"assert available_memory({str(tmp_path)!r}) <= {3 << 30}"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_descriptor_is_left(try_in: Callable[..., Server]) -> None:
    """Who has connected is served, the others wait for a place or are refused, and the log does not fill up."""
    server = try_in("ulimit -n 64")
    server.wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
        time.sleep(3)
    assert len(server.output().splitlines()) < 30
    deadline, status = time.monotonic() + 60, 0
    while status != 200 and time.monotonic() < deadline:  # 503 while the last ones are being closed
        assert server.process.poll() is None, server.output()
        status = httpx.get(f"{server.url}/health/live", timeout=60).status_code
        time.sleep(0.2)
    assert status == 200
