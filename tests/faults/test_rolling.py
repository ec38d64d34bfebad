"""A rolling restart behind a load balancer, as Debian packages it: nobody notices."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import Server, fake
from tests.waiting import poll

Start = Callable[..., Server]
NUM_STREAMS, REQUESTS_PER_SECOND = 32, 50
CONFIG = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream minisgl {{ {servers} keepalive 32; }}
    server {{
        listen unix:{socket};
        location / {{
            proxy_pass http://minisgl; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 60s;
            proxy_next_upstream error timeout http_503 non_idempotent;
        }}
    }}
}}
"""


URL = "http://127.0.0.1"


@pytest.fixture
def nginx(tmp_path: Path, short_path: Path) -> Iterator[Callable[[list[Server]], str]]:
    """Starts nginx before servers, and gives the path of its socket: a free port may be taken by others."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        if os.environ.get("CI") or os.environ.get("REQUIRE_NGINX"):
            pytest.fail("nginx is missing: apt-get install nginx-light")
        pytest.skip("needs nginx (apt-get install nginx-light)")
    started: list[subprocess.Popen[bytes]] = []

    def run(servers: list[Server]) -> str:
        path, folder = str(short_path / "nginx"), tmp_path / "nginx"
        folder.mkdir()
        listed = " ".join(f"server {server.url.removeprefix('http://')} max_fails=0;" for server in servers)
        (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, socket=path, servers=listed))
        command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        started.append(subprocess.Popen(command))
        poll(lambda: os.path.exists(path) or started[-1].poll() is not None, "nginx does not start")
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as http:
            assert http.get(f"{URL}/health/live").status_code == 200, (folder / "error.log").read_text()
        return path

    yield run
    for process in started:
        process.terminate()
        process.wait(60)


class Load(threading.Thread):
    """Streams one after the other, NUM_STREAMS at a time, and short requests at a steady rate, until `stop`."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._path, self._url = path, f"{URL}/v1/chat/completions"
        self.stop = threading.Event()
        self.results: Counter[str] = Counter()
        self.start()

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        transport = httpx.AsyncHTTPTransport(uds=self._path, limits=limits)
        async with httpx.AsyncClient(timeout=60, transport=transport) as client:
            streams = [asyncio.create_task(self._streams(client)) for _ in range(NUM_STREAMS)]
            requests: set[asyncio.Task[None]] = set()
            while not self.stop.is_set():
                requests.add(asyncio.create_task(self._request(client)))
                await asyncio.sleep(1 / REQUESTS_PER_SECOND)
            await asyncio.gather(*streams, *requests)

    async def _streams(self, client: httpx.AsyncClient) -> None:
        while not self.stop.is_set():
            await self._request(client, stream=True)

    async def _request(self, client: httpx.AsyncClient, stream: bool = False) -> None:
        messages: Any = [{"role": "user", "content": "hello"}]
        body = {"model": "fake-model", "messages": messages, "stream": stream, "max_tokens": 40 if stream else 2}
        try:
            answer = await client.post(self._url, json=body)
            is_whole = answer.text.endswith("data: [DONE]\n\n") if stream else "choices" in answer.json()
            fine = answer.status_code == 200 and is_whole and "error" not in answer.text
            self.results[("stream" if stream else "request") if fine else answer.text[-300:]] += 1
        except Exception as error:
            self.results[repr(error)] += 1


def test_a_rolling_restart_loses_no_request(
    start: Start, nginx: Callable[[list[Server]], str], model_path: Path
) -> None:
    servers = [start(fake(model_path, delay=0.02)) for _ in range(2)]
    load = Load(nginx(servers))
    for _ in range(2):
        time.sleep(2)
        old = servers.pop(0)
        old.process.terminate()
        assert old.wait_exit() == 0
        assert "Traceback" not in old.output()
        servers.append(start(fake(model_path, delay=0.02, port=int(old.url.rsplit(":", 1)[1]))))
    time.sleep(2)
    load.stop.set()
    load.join(120)
    num_streams, num_requests = load.results.pop("stream"), load.results.pop("request")
    assert load.results == {}
    assert num_streams > NUM_STREAMS
    assert num_requests > 100
    print(f"{num_streams} streams, {num_requests} requests")
