"""Real servers as subprocesses, and the stock OpenAI client."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.forked import BASE, Forked, can_be_forked
from tests.tokenizers_fixture import make_byte_level
from tests.waiting import poll, still_running

ROOT = Path(__file__).parents[2]
PYTHONPATH = BASE["PYTHONPATH"]
START_SECONDS = 200  # that a server may take to be ready, where other work has the cores
httpx._config.DEFAULT_TIMEOUT_CONFIG.read = 60.0  # its own five seconds are few on such a machine


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for sockets: their paths have 107 bytes at most, and pytest's own directories are deep."""
    with tempfile.TemporaryDirectory(prefix="t") as directory:
        yield Path(directory)


class Server:
    """A server process: `args` are those after `python`. Its children are noted when it is ready. What the walk over
    its pages finds ends its scheduler. is_new: its processes are new ones, and not forked (`tests.forked`)."""

    process: subprocess.Popen[bytes] | Forked

    def __init__(self, args: list[str], log: Path, *, wait: bool = True, is_new: bool = False, **env: str) -> None:
        self.log = log
        walk = {"MINISGL_CHECK_INTEGRITY": "4", "MINISGL_INTEGRITY_FATAL": "1"}
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": PYTHONPATH, **walk, **env}
        with log.open("wb") as output:
            if not is_new and can_be_forked(args, environment):
                self.process = Forked(args, environment, output)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, *args], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
                )
        self.url = ""
        self.children: list[psutil.Process] = []
        if wait:
            self.wait_ready()

    @classmethod
    @contextmanager
    def running(cls, args: list[str], log: Path, **env: str) -> Iterator[Server]:
        """For as long as it is used. Its log must have no traceback then."""
        server = cls(args, log, **env)
        try:
            yield server
        finally:
            server.close()
        assert "Traceback" not in server.output()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            line = next((line for line in self.output().splitlines() if line.startswith("minisgl serves")), None)
            if line is not None:
                self.url = line.split(" at ")[1].removesuffix("/v1")
                self.children = psutil.Process(self.process.pid).children(recursive=True)
                return
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready:\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def child(self, title: str) -> psutil.Process:
        """The child with this process title."""
        return next(child for child in self.children if " ".join(child.cmdline()).strip() == title)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def wait_exit(self, seconds: float = 100) -> int:
        return self.process.wait(seconds)

    def orphans(self) -> list[psutil.Process]:
        """Children that go on, though there is nothing that they could wait for."""
        return still_running(self.children)

    def load(self, name: str = "num_requests_in_flight") -> int:
        """How many requests there are of a kind, as the server says."""
        return int(httpx.get(f"{self.url}/server_info", timeout=60).json()["load"][name])

    def wait_load(self, count: int, name: str = "num_requests_in_flight") -> None:
        """Until there are so many requests of a kind: however long they are under way to the server."""
        poll(lambda: self.load(name) == count, f"{name} is never {count}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for child in self.children:
            with suppress(psutil.NoSuchProcess):  # nor does it run any more when it ends just now
                child.kill()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_level(tmp_path_factory.mktemp("models") / "fake-dir")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model: random weights, and the same tokenizer. Only who needs it imports torch."""
    from tests.models import tiny_model

    path = tmp_path_factory.mktemp("models") / "tiny-dir"
    shutil.copytree(tiny_model("qwen3", vocab_size=400), path)
    return make_byte_level(path)


@pytest.fixture(scope="session")
def server(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was. It publishes what becomes of its prefix cache."""
    logs = tmp_path_factory.mktemp("logs")
    events = f"ipc://{logs}/events,ipc://{logs}/replay"
    flags = "--max-seq-len", "256", "--kv-events-endpoint", events
    running = Server(real(tiny_path, *flags), logs / "server.log", MINISGL_NUM_TOKENIZER="1")
    yield running
    running.close()
    assert "Traceback" not in running.output()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of a test's own, and ends them with it."""
    started: list[Server] = []

    def start_server(args: list[str], *, wait: bool = True, **options: Any) -> Server:
        running = Server(args, tmp_path / f"server-{len(started)}.log", wait=False, **options)
        started.append(running)
        if wait:
            running.wait_ready()
        return running

    yield start_server
    for running in started:
        running.close()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def real(model_path: Path, *flags: str) -> list[str]:
    """The command of a server as anybody starts it."""
    return ["-m", "minisgl", "--model", str(model_path), "--served-model-name", "tiny", "--port", "0", *flags]


def fake(model_path: Path, **options: object) -> list[str]:
    """The command of a server whose engine is a formula (`tests.fake_server`)."""
    return ["-m", "tests.fake_server", str(model_path), *(f"{name}={value}" for name, value in options.items())]


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if forbidden %}{{ raise_exception('forbidden') }}{% endif %}"
    "<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}"
)


class Scripted:
    """A server, and what its model says: it has tools in the format of Hermes, and reasons as Qwen3 does."""

    def __init__(self, server: Server, answer: Path) -> None:
        self.client = server.client()
        self.url = server.url
        self._answer = answer

    def says(self, text: str) -> None:
        self._answer.write_text(text, encoding="utf-8")

    def chat(self, says: str, **options: Any) -> Any:
        self.says(says)
        return self.client.chat.completions.create(
            **{"model": "fake-model", "messages": [{"role": "user", "content": "hello"}], **options}
        )

    def stream(self, says: str, **options: Any) -> Any:
        """What the client's own accumulation makes of a stream."""
        self.says(says)
        defaults: dict[str, Any] = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}]}
        with self.client.chat.completions.stream(**{**defaults, **options}) as stream:
            return list(stream), stream.get_final_completion()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    directory = tmp_path_factory.mktemp("tools")
    path = make_byte_level(directory / "model", template=TEMPLATE)
    answer = directory / "answer.txt"
    server = Server(fake(path, answer=answer, tools="hermes", reasoning="qwen3"), directory / "server.log")
    made = Scripted(server, answer)
    yield made
    made.client.close()
    server.close()
    assert "Traceback" not in server.output()
