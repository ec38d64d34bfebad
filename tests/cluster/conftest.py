"""Real clusters: `minisgl cluster serve` as a subprocess, on a Ray of its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
import pytest

from minisgl.cluster.commands import main
from tests.waiting import still_running

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
STARTED = re.compile("existing Serve|minisgl serves")  # in a log: Ray has
START_SECONDS = 240
MODEL = "minisgl-demo"


class Cluster:
    """One that runs. args: what follows `minisgl`."""

    def __init__(self, args: list[str], log: Path) -> None:
        self.log = log
        environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}", "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("wb") as output:
            command = [sys.executable, "-m", "minisgl", *args]
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ, cwd=ROOT)
        self.url = ""
        self._client = httpx.Client(timeout=60)  # one for all: to make one takes longer than what is asked

    def wait_ready(self) -> None:
        wait_for(lambda: "minisgl serves" in self.text or self.process.poll() is not None, START_SECONDS)
        found = re.search(r"minisgl serves .* at (http://\S+)/v1", self.text)
        assert found, self.text
        self.url = found[1]

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        return self._client.get(self.url + path).raise_for_status().json()

    def replicas(self) -> dict[str, int]:
        """Names, and the process of each one's server; nothing while Ray does not know."""
        try:
            return {one["name"]: one["pid"] for one in self.get("/cluster")["replicas"]}
        except httpx.HTTPError:
            return {}

    def busiest(self) -> tuple[str, int]:
        """The replica that has most to do, once one has."""
        found: list[Any] = []

        def look() -> bool:
            found[:] = sorted(self.get("/cluster")["replicas"], key=lambda one: -one["load"])
            return bool(found[0]["load"])

        wait_for(look, 60)
        return found[0]["name"], found[0]["pid"]

    def wait_replicas(self, count: int, without: set[str] = frozenset(), seconds: float = 200) -> None:
        wait_for(lambda: len(names := self.replicas().keys()) == count and not names & without, seconds)

    def actor(self, title: str) -> psutil.Process:
        """The worker of Ray that has this title."""
        return next(one for one in self.family() if " ".join(one.cmdline()).strip() == title)

    def family(self) -> list[psutil.Process]:
        """All its processes. Ray's workers are nobody's children, but have files in the cluster's own folder open."""
        family = {one.pid: one for one in psutil.Process(self.process.pid).children(recursive=True)}
        folder = next(iter(re.findall(r"/minisgl-\w+/ray/", " ".join(map(_words, family.values())))), "none")
        for process in psutil.process_iter():
            if process.pid not in family and any(folder in path for path in _files(process)):
                family |= {one.pid: one for one in (process, *process.children(recursive=True))}
        return list(family.values())

    def command(self, *words: str) -> None:
        """What an operator types."""
        assert main([*words, "--url", self.url]) == 0

    def close(self) -> None:
        self._client.close()

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 100) -> int:
        self.process.send_signal(signum)
        return self.process.wait(seconds)


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _files(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except (psutil.Error, OSError):
        return []


def left_behind(family: list[psutil.Process]) -> list[str]:
    """What of these processes goes on. Two agents of Ray's own look for their cluster only now and then."""
    left = still_running([one for one in family if "Agent" not in _words(one)], 60)
    return list(filter(None, map(_words, left)))


def wait_for(holds: Callable[[], Any], seconds: float, interval: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(interval)


@contextmanager
def alone() -> Iterator[None]:
    """No other test starts a Ray meanwhile: its nodes give up after half a minute."""
    with (Path(tempfile.gettempdir()) / "minisgl-test-cluster.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def patiently(start: Callable[[], T]) -> T:
    """What starts a node of Ray, on a busy machine perhaps not at the first time."""
    with alone():
        for _ in range(2):
            with suppress(Exception):
                return start()
        return start()


@contextmanager
def running(log: Path, *flags: str) -> Iterator[Cluster]:
    starting = ExitStack()
    starting.enter_context(alone())
    cluster = Cluster(["cluster", "serve", "--port", "0", *flags], log)
    try:
        with starting:
            wait_for(lambda: cluster.process.poll() is not None or STARTED.search(cluster.text), START_SECONDS)
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.close()
        family = cluster.family() if cluster.process.poll() is None else []
        if cluster.process.poll() is None:
            cluster.stop()
        alive = still_running(family, 60)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas."""
    with running(tmp_path_factory.mktemp("cluster") / "log", "--replicas", "2", "--max-replicas", "2") as one:
        yield one


class Load:
    """Requests that stream, as many at a time as asked for, with the stock client. Each is told how it ended. pause:
    seconds between two of them. It and max_tokens may be changed: a server that starts has the cores while nothing else
    is to be seen, and one that ends has requests that would not end by themselves."""

    def __init__(self, url: str, count: int, max_tokens: int = 60, pause: float = 0.02) -> None:
        self.ends: list[str] = []
        self.begun = self.streaming = 0  # events that have come; requests that have had one, and go on
        self.pause, self.max_tokens = pause, max_tokens
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(count)]

    async def once(self, text: str) -> str:
        """How it ended: `length`, `stop`, or an error's words."""
        end, has_begun = "without an end", False
        try:
            stream = await self._client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": text}],
                max_tokens=self.max_tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for event in stream:
                self.begun, self.streaming, has_begun = self.begun + 1, self.streaming + (not has_begun), True
                if event.choices and event.choices[0].finish_reason:
                    assert end == "without an end", "a request ended twice"
                    end = event.choices[0].finish_reason
        except openai.APIError as error:
            assert end == "without an end", "a request ended twice"
            end = f"{type(error).__name__}: {error}"
        finally:
            self.streaming -= has_begun
        return end

    async def _run(self, index: int) -> None:
        while not self._stop.is_set():
            self.ends.append(await self.once(f"Request {index}: tell me about {len(self.ends)} things."))
            await asyncio.sleep(self.pause)  # for what else there is to do on this machine

    async def stop(self) -> list[str]:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._client.close()
        return self.ends
