"""One replica: a whole server in processes of its own, and the Ray actor that starts it, watches it and ends it."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import ray
from ray import serve

from minisgl.errors import WorkerDied
from minisgl.server.launch import bind_port

_READY = re.compile(r"minisgl serves .*:(\d+)/v1$")
_STOP_SECONDS = 15.0  # beyond the drain timeout
_ASK_SECONDS = 10.0
_MAX_SILENT = 2  # times that a server may be asked in vain for its health: it stands still, and will not end by itself
_SAMPLE = re.compile(r"^minisgl:(num_requests_waiting|kv_cache_usage_perc|request_prompt_tokens_\w+)\S* (\S+)", re.M)


class Replica:
    """What Ray runs: its constructor returns when the server is ready, and the actor ends when the server does.

    options: of the server, by the flags' names. host: the address that it has, at a free port; "": this node's.
    Raises: WorkerDied, with the server's own words, when it does not start.
    """

    def __init__(self, options: Mapping[str, Any], host: str) -> None:
        host, keys = host or node_address(), options.get("admin_key") or options.get("api_key") or [""]
        with closing(bind_port(host, 0)) as first, closing(bind_port(host, 0)) as second:
            events = [f"tcp://{host}:{free.getsockname()[1]}" for free in (first, second)]
        self._drain_timeout, self._stopping, self._silent = float(options.get("drain_timeout", 10.0)), False, 0
        self._headers = {"authorization": f"Bearer {keys[0]}"} if keys[0] else {}
        text, port = json.dumps([host, {**options, "kv_events_endpoint": events}]), Future[str]()
        threading.Thread(target=self._run, args=(text, port), daemon=True).start()
        name, url = serve.get_replica_context().replica_id.unique_id, f"http://{host}:{port.result()}"
        self._told = {"name": name, "url": url, "events": events, "pid": self._server.pid}

    def _run(self, text: str, port: Future[str]) -> None:
        """The server's life, which ends with this thread. Ray starts another replica as soon as this actor is gone; of
        the server itself it would hear late."""
        env = {**os.environ, "FORWARDED_ALLOW_IPS": "*", "PYTHONSAFEPATH": "1"}  # only the ingress comes here
        pipe, command = subprocess.PIPE, [sys.executable, "-m", "minisgl.cluster.child", str(os.getpid())]
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._server.stdin as options:
            options.write(text)
        last = ""
        for last in self._server.stdout:
            if (found := _READY.search(last)) is not None:
                port.set_result(found[1])
        status = self._server.wait()
        if not port.done():
            port.set_exception(WorkerDied(f"replica: {last.strip() or f'the server ends with status {status}'}"))
        elif not self._stopping:
            os._exit(1)

    def record_replica_metadata(self) -> dict[str, Any]:
        """What routers have to know: where the server is, and where it publishes. Ray calls this, once."""
        return self._told

    async def check_health(self) -> None:
        """Raises: OSError unless the server's own /health is well."""
        try:
            await asyncio.to_thread(self._ask, "/health")
            self._silent = 0
        except TimeoutError:
            self._silent += 1
            if self._silent >= _MAX_SILENT:
                self.end()
            raise

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tokens of prompts that wait, and the share of the KV cache in use by requests that run."""
        text = await asyncio.to_thread(self._ask, "/metrics")
        found = {name: float(value) for name, value in _SAMPLE.findall(text)}
        mean = found.get("request_prompt_tokens_sum", 0.0) / max(1.0, found.get("request_prompt_tokens_count", 0.0))
        waiting = found.get("num_requests_waiting", 0.0)
        return {"queued_tokens": waiting * max(1.0, mean), "kv_use": found.get("kv_cache_usage_perc", 0.0)}

    def _ask(self, path: str) -> str:
        request = urllib.request.Request(f"{self._told['url']}{path}", headers=self._headers)
        with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as answer:
            return str(answer.read().decode())

    def end(self) -> None:
        """At once; this actor follows."""
        self._server.kill()

    def __del__(self) -> None:
        """Let the requests that run finish, and end the server. Ray calls this when it stops the replica."""
        self._stopping = True
        self._server.terminate()
        try:
            self._server.wait(self._drain_timeout + _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.end()


def node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
