"""What may go wrong with a Ray that is somebody else's: addresses, versions, room, nodes, objects. All is real."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from ray.cluster_utils import Cluster as RayNodes

from tests.cluster.conftest import MODEL, ROOT, Cluster, Load, patiently, running, wait_for

pytestmark = pytest.mark.timeout(600)
OTHER_NODE = "127.0.0.2"
HELLO = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
MAIN = "from minisgl.__main__ import main; sys.exit(main())"

# Somebody else's application, which has a CPU, and objects, of which the store is full, until a line comes.
NEIGHBOUR = """
import sys, time, numpy, ray
from ray import serve
ray.init(sys.argv[1], log_to_driver=False)
serve.start(proxy_location="Disabled")
@serve.deployment(ray_actor_options={"num_cpus": 1})
class Neighbour: pass
serve.run(Neighbour.bind(), name="neighbour", route_prefix=None)
kept = []
try:
    while True:
        kept.append(ray.put(numpy.zeros(2**22, "uint8")))
except ray.exceptions.OutOfDiskError:
    print("full", flush=True)
sys.stdin.readline()
end = time.monotonic() + 200
while len(applications := serve.status().applications) > 1 and time.monotonic() < end:
    time.sleep(0.5)
print(*applications, flush=True)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[RayNodes, Any]]:
    """A head and another node, with a CPU each. Their object stores are small, and what does not fit has no disk."""
    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    no_spilling = {"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{ROOT / 'python'}:{ROOT}")
        head = {**small, "include_dashboard": False, "_system_config": no_spilling}
        cluster = patiently(lambda: RayNodes(initialize_head=True, head_node_args=head))
        try:
            yield cluster, patiently(lambda: cluster.add_node(node_ip_address=OTHER_NODE, **small))
        finally:
            cluster.shutdown()


@contextmanager
def neighbour(address: str) -> Iterator[subprocess.Popen[str]]:
    command, pipe = [sys.executable, "-c", NEIGHBOUR, address], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "full\n"
            yield process
        finally:
            process.kill()


def refused(*flags: str, patch: str = "") -> str:
    """What `minisgl cluster serve` says last; it ends with status 2. patch: Python that runs before it."""
    command = [sys.executable, "-c", f"import sys; {patch}{MAIN}", "cluster", "serve", "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    return ended.stderr.strip().splitlines()[-1].removeprefix("minisgl: error: ")


def test_an_address_where_nobody_is() -> None:
    assert refused("--address", "127.0.0.1:1") == "--address 127.0.0.1:1: no Ray answers there (Connection refused)"


def test_another_version(nodes: tuple[RayNodes, Any]) -> None:
    address = nodes[0].address
    words = refused("--address", address, patch="import ray; ray.__version__ = '2.99.1'; ")
    assert re.match(rf"--address {address}: Version mismatch: .* Ray: 2\.99\.1", words), words


async def test_a_ray_that_is_joined(nodes: tuple[RayNodes, Any], tmp_path: Path) -> None:
    """Others have most of the room and the whole object store. Only what is ours ends, also with a killed command."""
    address = nodes[0].address
    with neighbour(address) as other:
        words = refused("--address", address, "--replicas", "2")
        assert words == "--replicas 2: Ray has no room for 2 more with {'CPU': 1.0} each"
        flags = "--replicas", "1", "--max-replicas", "2", "--address", address, "--drain-timeout", "100"
        with running(tmp_path / "log", *flags) as cluster:
            again = f"--address {address}: a cluster is there already; minisgl cluster drain ends it"
            assert refused("--address", address) == again
            long = {**HELLO, "prompt": "Hello " * 300, "user": "x" * 2**20}
            for body in (HELLO, long):
                answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()
                assert answer.json()["usage"]["completion_tokens"] == 4
            await _drained(cluster)
        with running(tmp_path / "second log", *flags) as cluster:
            (server,) = cluster.replicas().values()
            cluster.process.kill()
            wait_for(lambda: not psutil.pid_exists(server), 200)
        assert "neighbour" in other.communicate("\n")[0].splitlines()  # Ray may say there that a worker has died


async def _drained(cluster: Cluster) -> None:
    """By an operator, and by nobody else: what runs ends, and clients are told before connections are closed."""
    load = Load(cluster.url, 4, max_tokens=300)
    while load.begun < 50:
        await asyncio.sleep(0.02)
    with httpx.Client(base_url=cluster.url, timeout=60) as kept:
        assert "connection" not in kept.get("/v1/models").headers
        foreign = httpx.post(f"{cluster.url}/cluster/drain", headers={"origin": "https://evil.example"})
        assert (foreign.status_code, cluster.get("/cluster")["draining"]) == (403, False)
        cluster.command("drain")
        ending = asyncio.create_task(load.stop())
        await asyncio.to_thread(wait_for, lambda: kept.get("/v1/models").headers.get("connection") == "close", 60)
    assert await asyncio.to_thread(cluster.process.wait, 200) == 0, cluster.text
    assert set(await ending) == {"length"}
