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
from contextlib import closing
from typing import IO, Any

import ray
from ray import serve

from minisgl.cluster.child import FAILED
from minisgl.errors import WorkerDied
from minisgl.server.launch import bind_port

_READY = re.compile(r"minisgl serves .*:(\d+)/v1$")
_STOP_SECONDS = 15.0  # beyond the drain timeout
_ASK_SECONDS = 10.0
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
        self._drain_timeout, self._stopping = float(options.get("drain_timeout", 10.0)), False
        self._headers = {"authorization": f"Bearer {keys[0]}"} if keys[0] else {}
        env = {**os.environ, "FORWARDED_ALLOW_IPS": "*", "PYTHONSAFEPATH": "1"}  # only the ingress comes here
        pipe, command = subprocess.PIPE, [sys.executable, "-m", "minisgl.cluster.child"]
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps([host, {**options, "kv_events_endpoint": events}]), file=self._server.stdin, flush=True)
        last, found = "", None
        for line in self._server.stdout:
            if (found := _READY.search(line)) is not None:
                break
            last = line
        if found is None:
            words = last.strip().partition(FAILED)[2] or f"the server ends with status {self._server.wait()}"
            raise WorkerDied(f"replica: {words}")
        name = serve.get_replica_context().replica_id.unique_id
        url = f"http://{host}:{found[1]}"
        self._told = {"name": name, "url": url, "events": events, "pid": self._server.pid}
        threading.Thread(target=self._watch, args=(self._server.stdout,), daemon=True).start()

    def _watch(self, output: IO[str]) -> None:
        """Ray starts another replica as soon as this actor is gone; of the server itself it would hear late."""
        for _ in output:
            pass
        self._server.wait()
        if not self._stopping:
            os._exit(1)

    def record_replica_metadata(self) -> dict[str, Any]:
        """What routers have to know: where the server is, and where it publishes. Ray calls this, once."""
        return self._told

    async def check_health(self) -> None:
        """Raises: OSError unless the server's own /health is well."""
        await asyncio.to_thread(self._ask, "/health")

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
            self._server.kill()


def node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
