"""The manifest for KubeRay, as far as it goes without Kubernetes: its pods by the published schema, and its Serve
configuration on a real Ray, in the order that KubeRay has: first a head, then the configuration, then workers."""

from __future__ import annotations

import asyncio
import importlib
import re
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from ray.cluster_utils import Cluster as RayNodes
    from ray.serve.schema import ServeDeploySchema

from minisgl.config.args import args_from_options
from tests.cluster.conftest import MODEL, ROOT, Load, patiently, wait_for

pytestmark = pytest.mark.timeout(600)
(TEXT,) = re.findall(r"```yaml\n(apiVersion: ray.io.*?)```", (ROOT / "docs" / "howto" / "cluster.md").read_text(), re.S)
SPEC = yaml.safe_load(TEXT)["spec"]
CONFIG = yaml.safe_load(SPEC["serveConfigV2"])
HEAD, (WORKERS,) = SPEC["rayClusterConfig"]["headGroupSpec"], SPEC["rayClusterConfig"]["workerGroupSpecs"]
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}  # of KubeRay's API, v1


def test_the_manifest_has_what_its_readers_know() -> None:
    validate = importlib.import_module("kubernetes_validate").validate
    for group in (HEAD, WORKERS):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
        validate(pod, "1.37", strict=True)
        assert group.keys() <= GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    (application,) = ServeDeploySchema.model_validate(CONFIG).applications
    assert application.import_path == "minisgl.cluster:app"
    args = {name: value for name, value in application.args.items() if name not in ("replicas", "max_replicas")}
    assert (args_from_options(args).model_path, args_from_options(args).device) == ("Qwen/Qwen3-0.6B", "cuda")
    assert WORKERS["replicas"] >= application.args["replicas"]
    assert WORKERS["maxReplicas"] >= application.args["max_replicas"]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'python'}:{ROOT}")
    args: dict[str, Any] = {"num_cpus": int(HEAD["rayStartParams"]["num-cpus"]), "object_store_memory": 80 * 2**20}
    args["include_dashboard"] = True
    cluster = patiently(lambda: RayNodes(initialize_head=True, head_node_args=args | {"dashboard_port": free()}))
    try:
        yield cluster
    finally:
        cluster.shutdown()


async def test_ray_serves_the_manifest(head: RayNodes) -> None:
    """With the built-in model and on CPUs: that, and the port, is all that is changed. Then other arguments come, as
    with `kubectl apply`, while requests run: one replica after the other is replaced, and none of them fails."""
    api, url = f"http://{head.webui_url}/api/serve/applications/", f"http://127.0.0.1:{(port := free())}"
    (application,) = (config := CONFIG | {"proxy_location": "HeadOnly", "http_options": {"port": port}})["applications"]
    application["args"] |= {"device": "cpu", "cpu_threads": 1}
    del application["args"]["model"]

    def told() -> Any:
        return httpx.get(api, timeout=60, verify=False).raise_for_status().json()["applications"][application["name"]]

    def replicas(told: Any) -> dict[str, str]:  # and their states; none while Serve builds the application anew
        found = told["deployments"].get("Replica", {}).get("replicas", [])
        return {one["replica_id"]: one["state"] for one in found}

    def deploy() -> None:
        httpx.put(api, json=config, timeout=60).raise_for_status()

    deploy()
    wait_for(lambda: "Replica" in told()["deployments"] or told()["status"] == "DEPLOY_FAILED", 60)
    assert told()["status"] == "DEPLOYING", told()
    cpus = application["args"]["replicas"]
    patiently(lambda: head.add_node(num_cpus=cpus, object_store_memory=80 * 2**20))  # of all workers
    wait_for(lambda: told()["status"] == "RUNNING", 240)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        extra = {"ignore_eos": True}
        answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    refused = httpx.post(f"{url}/cluster/scale", json={"replicas": 1})
    assert refused.status_code == 409, refused.text
    before = replicas(told()).keys()
    assert len(before) == application["args"]["replicas"]
    load = Load(url, 2, max_tokens=20)
    application["args"]["max_running_requests"] = 64
    deploy()

    def is_renewed() -> bool:
        now = replicas(state := told())
        load.pause = 0.3 if "STARTING" in now.values() else 0.02  # there is always something to do where one ends
        return state["status"] == "RUNNING" and len(now) == len(before) and not now.keys() & before

    await asyncio.to_thread(wait_for, is_renewed, 240, 0.5)
    assert set(await load.stop()) == {"length"}
    assert httpx.get(f"{url}/server_info", timeout=60).json()["max_running_requests"] == 64


def free() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
