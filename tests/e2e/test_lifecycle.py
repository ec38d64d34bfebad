"""How servers start, stop and fail. Nothing hangs, nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from minisgl.config.args import parse_args
from minisgl.config.probe import probe
from minisgl.errors import ConfigError
from minisgl.server.launch import serve
from tests.e2e.conftest import ROOT, Server, fake, real
from tests.waiting import poll

Start = Callable[..., Server]
HELLO: Any = [{"role": "user", "content": "hello"}]
WORKERS = ("minisgl-TP0-scheduler", "minisgl-detokenizer-0", "minisgl-tokenizer-0")


class Background(threading.Thread):
    """A chat in the background, and how it ended. `begun` is set when its first event is here."""

    def __init__(self, server: Server, *, stream: bool, max_tokens: int = 490) -> None:
        super().__init__(daemon=True)
        self.body = {"messages": HELLO, "max_tokens": max_tokens, "stream": stream}
        self.url = f"{server.url}/v1/chat/completions"
        self.begun = threading.Event()
        self.status = 0
        self.events: list[str] = []
        self.start()
        if stream:
            assert self.begun.wait(60)

    def run(self) -> None:
        with httpx.Client(timeout=250) as client, client.stream("POST", self.url, json=self.body) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                self.events += [line] if line else []
                self.begun.set()

    def end(self) -> None:
        self.join(100)
        assert not self.is_alive(), "the request hangs"


def test_processes_have_their_names_and_a_private_directory(start: Start, model_path: Path, short_path: Path) -> None:
    server = start(fake(model_path, num_tokenizer=2), is_new=True, TMPDIR=str(short_path))
    titles = {" ".join(child.cmdline()).strip() for child in server.children}
    expected = {"minisgl-TP0-scheduler", "minisgl-detokenizer-0", "minisgl-tokenizer-0", "minisgl-tokenizer-1"}
    assert expected <= titles
    (directory,) = short_path.glob("minisgl-*")
    assert directory.stat().st_mode & 0o777 == 0o700
    with server.client() as client:
        for _ in range(4):
            assert client.chat.completions.create(model="fake-model", messages=HELLO, max_tokens=4).choices
    server.process.terminate()
    assert server.wait_exit() == 0
    assert not directory.exists()


@pytest.mark.parametrize("worker", WORKERS)
def test_a_killed_worker_fails_requests_and_ends_the_server(start: Start, model_path: Path, worker: str) -> None:
    fast = {"MINISGL_DRAIN_TIMEOUT": "1000"}  # if it is waited for, that is noticed
    server = start(fake(model_path, delay=0.05, num_tokenizer=1, restart_workers=0), **fast)
    stream, whole = Background(server, stream=True), Background(server, stream=False)
    server.wait_load(2)
    server.child(worker).kill()
    stream.end()
    whole.end()
    error = json.loads(stream.events[-1].removeprefix("data: "))["error"]
    assert worker in error["message"]
    assert (error["type"], whole.status) == ("server_error", 503)
    assert worker in json.loads(whole.events[0])["error"]["message"]
    assert server.wait_exit() == 1
    assert server.orphans() == []
    assert worker in server.output()
    assert "SIGKILL" in server.output()
    assert "Traceback" not in server.output()


def test_a_worker_that_falls_silent_ends_the_server(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, restart_workers=0, heartbeat_timeout=2))
    server.child("minisgl-TP0-scheduler").send_signal(signal.SIGSTOP)
    assert server.wait_exit() == 1
    assert server.orphans() == []
    assert "silent" in server.output()


def test_children_do_not_outlive_a_killed_parent(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, delay=0.05, num_tokenizer=1))
    with httpx.Client(timeout=60) as client:
        body = {"messages": HELLO, "max_tokens": 490, "stream": True}
        with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_bytes())
            server.process.kill()
            server.process.wait()
            assert server.orphans() == []


def test_a_signal_drains_and_stops(start: Start, model_path: Path) -> None:
    """Any other signal does, too: tests/faults/test_drain.py."""
    server = start(fake(model_path, delay=0.03))
    stream = Background(server, stream=True, max_tokens=60)
    server.process.send_signal(signal.SIGTERM)
    stream.end()
    assert stream.events[-1] == "data: [DONE]"
    assert '"length"' in stream.events[-2]
    assert server.wait_exit() == 0
    assert server.orphans() == []
    assert "Traceback" not in server.output()


def test_a_signal_to_the_whole_group_drains_too(start: Start, model_path: Path) -> None:
    """As service managers send it."""
    server = start(fake(model_path, delay=0.03))
    stream = Background(server, stream=True, max_tokens=60)
    for process in (*server.children, psutil.Process(server.process.pid)):
        process.send_signal(signal.SIGTERM)
    stream.end()
    assert stream.events[-1] == "data: [DONE]"
    assert server.wait_exit() == 0
    assert server.orphans() == []


def test_a_drain_ends_in_time(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, delay=0.1), MINISGL_DRAIN_TIMEOUT="1")
    stream = Background(server, stream=True)
    num_before = len(stream.events)
    server.interrupt()
    stream.end()
    assert "shutting down" in stream.events[-1]
    assert server.wait_exit() == 0
    assert len(stream.events) - num_before < 50, "each of them takes a tenth of a second, and more on a busy machine"


def test_a_second_ctrl_c_does_not_wait(start: Start, model_path: Path) -> None:
    server = start(fake(model_path, delay=0.2), MINISGL_DRAIN_TIMEOUT="1000")
    stream = Background(server, stream=True)
    server.interrupt()
    poll(lambda: httpx.get(f"{server.url}/health").status_code == 503, "it does not drain")
    server.interrupt()
    stream.end()
    assert len(stream.events) < 400, "it was waited for"
    assert server.wait_exit() == 0
    assert server.orphans() == []


@pytest.mark.parametrize(
    ("signum", "delay"),
    [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.4), (signal.SIGHUP, 0.0), (signal.SIGQUIT, 0.4), (signal.SIGINT, 0.4)],
)
def test_a_signal_during_start_up_leaves_nothing(
    start: Start, model_path: Path, short_path: Path, signum: signal.Signals, delay: float
) -> None:
    server = start(fake(model_path, num_tokenizer=1), wait=False, is_new=True, TMPDIR=str(short_path))
    parent = psutil.Process(server.process.pid)
    poll(lambda: len(parent.children()) >= 2, "it starts no workers")
    time.sleep(delay)
    server.children = parent.children()
    server.process.send_signal(signum)
    assert server.wait_exit() == 130, server.output()
    assert server.orphans() == []
    assert server.output() == ""
    assert not list(short_path.glob("minisgl-*"))


def processor_time() -> float:
    """Seconds, of all children of this process that have ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_taken_port_is_one_line_and_at_once(start: Start, model_path: Path) -> None:
    before = processor_time()
    nowhere = ["-m", "minisgl", "--port", "0", "--host", "no.such.host.invalid"]
    assert start(nowhere, wait=False, is_new=True).wait_exit() == 2
    at_once = processor_time() - before  # what Python and the imports take
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for listening in (False, True):
            if listening:
                taken.listen()
            before = processor_time()
            server = start(fake(model_path, port=port), wait=False, is_new=True)
            assert server.wait_exit() == 2
            assert processor_time() - before < 2 * at_once + 1, "workers were started"
            (line,) = server.output().splitlines()
            holder = f" by {psutil.Process().name()} (process {os.getpid()})" if listening else ""
            assert line == f"minisgl: error: --port {port}: 127.0.0.1:{port} is taken{holder}; choose another"


def test_a_gpu_that_is_not_there_is_told_before_a_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.config.resolve.probe", lambda: replace(probe(), gpus=()))
    monkeypatch.setattr("minisgl.config.locate.download", lambda *_: pytest.fail("it is fetched"))
    with pytest.raises(ConfigError, match=r"^--device cuda: "):
        serve(parse_args(["--model", "org/name", "--device", "cuda", "--port", "0"], {}))


def test_two_servers_side_by_side_and_a_restart_on_the_same_port(start: Start, model_path: Path) -> None:
    first, second = start(fake(model_path)), start(fake(model_path))
    texts = []
    for server in (first, second):
        with server.client() as client:
            made = client.chat.completions.create(model="fake-model", messages=HELLO, max_tokens=8, temperature=0)
            texts.append(made.choices[0].message.content)
    assert texts[0] == texts[1]
    with httpx.Client() as client:  # a connection that the server closes, and that lingers in TIME_WAIT
        client.get(f"{first.url}/health")
        first.process.terminate()
        assert first.wait_exit() == 0
    assert httpx.get(f"{second.url}/health").status_code == 200
    third = start(fake(model_path, port=int(first.url.rsplit(":", 1)[1])))
    assert third.url == first.url
    assert httpx.get(f"{third.url}/health").status_code == 200


@pytest.mark.parametrize("worker", ["minisgl-TP0-scheduler", "minisgl-detokenizer-0"])
def test_a_child_that_cannot_start_ends_the_start_up(start: Start, model_path: Path, worker: str) -> None:
    server = start(fake(model_path, die=worker), wait=False, is_new=True)
    assert server.wait_exit() == 2
    (line,) = server.output().splitlines()
    assert line == f"minisgl: error: {worker}: the model is made of cheese"


def test_a_model_directory_without_tokenizer(start: Start, tmp_path: Path) -> None:
    server = start(fake(tmp_path / "empty"), wait=False)
    assert server.wait_exit() == 2
    (line,) = server.output().splitlines()
    assert "minisgl: error: minisgl-detokenizer-0:" in line
    assert "empty: no such model directory" in line


def test_only_the_scheduler_loads_torch(start: Start, tiny_path: Path) -> None:
    server = start(real(tiny_path), is_new=True)
    with server.client() as client:
        assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices
    for process in (psutil.Process(server.process.pid), *server.children):
        has_torch = any("libtorch" in mapped.path for mapped in process.memory_maps())
        assert has_torch == ("scheduler" in " ".join(process.cmdline()))


def test_health_is_503_when_the_scheduler_hangs(start: Start, model_path: Path) -> None:
    server = start(fake(model_path), MINISGL_HEALTH_TIMEOUT="1")
    scheduler = server.child("minisgl-TP0-scheduler")
    scheduler.send_signal(signal.SIGSTOP)
    answer = httpx.get(f"{server.url}/health")
    assert answer.status_code == 503
    assert "error" in answer.json()
    scheduler.send_signal(signal.SIGCONT)
    poll(lambda: httpx.get(f"{server.url}/health").status_code == 200, "it hangs still")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_real_scheduler_dies_like_a_fake_one(start: Start, tiny_path: Path, victim: int) -> None:
    """The only rank of a server: tests/faults/test_restart.py."""
    server = start(real(tiny_path, "--tp", "2"), MINISGL_RESTART_WORKERS="0")
    with server.client() as client:
        body: Any = {"ignore_eos": True}
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, extra_body=body)
        next(iter(stream))
        server.child(f"minisgl-TP{victim}-scheduler").kill()
        with pytest.raises(openai.APIError, match="scheduler"):
            for _ in stream:
                pass
    assert server.wait_exit() == 1
    assert server.orphans() == []


def test_a_real_server_stops_at_ctrl_c(start: Start, tiny_path: Path) -> None:
    server = start(real(tiny_path, "--tp", "2"), is_new=True)
    stream = Background(server, stream=True, max_tokens=60)
    server.interrupt()
    stream.end()
    assert stream.events[-1] == "data: [DONE]"
    assert server.wait_exit() == 0
    assert server.orphans() == []
    assert "Traceback" not in server.output()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "/no/such/model"], "--model /no/such/model"),
        (["--model", "."], "config.json"),
        (["--port", "99999"], "--port 99999"),
        (["--prot", "80"], "--port"),
        (["--host", "256.1.1.1"], "--host 256.1.1.1"),
        (["--dtype", "int3"], "--dtype int3"),
    ],
)
def test_what_cannot_work_is_one_line(start: Start, flags: list[str], expected: str) -> None:
    server = start(["-m", "minisgl", "--port", "0", *flags], wait=False)
    assert server.wait_exit() == 2
    (line,) = server.output().splitlines()
    assert line.startswith("minisgl: error: ")
    assert expected in line


def test_a_checkpoint_that_cannot_be_loaded_is_one_line(start: Start, tiny_path: Path, tmp_path: Path) -> None:
    """The child fails, and its words are the server's."""
    shutil.copytree(tiny_path, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not tensors")
    server = start(real(tmp_path / "broken"), wait=False)
    assert server.wait_exit() == 2
    last = server.output().splitlines()[-1]
    assert last.startswith("minisgl: error: minisgl-TP0-scheduler: ")
    assert "Traceback" not in server.output()


def test_help_is_there_at_once() -> None:
    code = (
        "import sys, minisgl.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'numpy', 'zmq'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--tensor-parallel-size" in ended.stdout
