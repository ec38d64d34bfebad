"""What a cluster is planned to be, before anything is started. Ray's own schema says whether that makes sense."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from ray.serve.config import AutoscalingContext
    from ray.serve.schema import ServeDeploySchema

    from minisgl.cluster.ingress import Ingress
    from minisgl.cluster.owner import reach
    from minisgl.cluster.serving import Plan, autoscaling, build, replica_needs, server_options
from minisgl.cluster.router import KV_USE, QUEUED_TOKENS
from minisgl.config.args import args_from_options, parse_args
from minisgl.config.runtime import AccessConfig
from minisgl.errors import ConfigError
from minisgl.server.access import guarded

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "cluster.md"


def needs(nodes: list[dict[str, float]], replicas: int = 1, **options: Any) -> tuple[dict[str, Any], dict[str, float]]:
    return replica_needs(args_from_options(options), Plan(options, replicas, replicas), nodes)


def test_the_manifest_is_one_that_ray_takes() -> None:
    (text,) = re.findall(r"```yaml\n(apiVersion: ray.io.*?)```", HOWTO.read_text(), re.S)
    manifest = yaml.safe_load(text)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"])).applications
    assert application.import_path == "minisgl.cluster:app"
    args = {name: value for name, value in application.args.items() if name not in ("replicas", "max_replicas")}
    assert args_from_options(args).model_path == "Qwen/Qwen3-0.6B"
    groups = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert groups[0]["maxReplicas"] >= application.args["max_replicas"]


def test_gpus_of_a_replica_are_of_one_node() -> None:
    assert needs([{"CPU": 8, "GPU": 2}] * 2, 2, tp=2) == ({"device": "cuda"}, {"num_gpus": 2, "num_cpus": 1.0})
    with pytest.raises(ConfigError, match=r"--replicas 2: each needs 2 GPUs of one node; there is room for 0"):
        needs([{"CPU": 8, "GPU": 1}] * 4, 2, tp=2)
    with pytest.raises(ConfigError, match="there is room for 0"):
        needs([{"CPU": 8}], device="cuda")


def test_cpus_are_shared() -> None:
    assert needs([{"CPU": 16}], 4) == ({"device": "cpu", "cpu_threads": 4}, {"num_cpus": 4.0})
    assert needs([{"CPU": 2}], 3) == ({"device": "cpu", "cpu_threads": 1}, {"num_cpus": 0.66})
    assert needs([{"CPU": 16, "GPU": 1}], 2, device="cpu", cpu_threads=2)[0] == {"device": "cpu", "cpu_threads": 2}
    for nodes, replicas, options in (([{"CPU": 2}], 40, {}), ([{"CPU": 4}] * 2, 1, {"cpu_threads": 6})):
        with pytest.raises(ConfigError, match=r"find no room on \d+ CPUs"):
            needs(nodes, replicas, **options)


@pytest.mark.parametrize(
    ("queued", "use", "wanted"),
    [([0, 0], [0.1, 0.1], 1), ([QUEUED_TOKENS * 2.5, 0], [0.2, 0.2], 3), ([0, 0], [KV_USE + 0.1] * 2, 3), ([], [], 1)],
)
def test_as_many_replicas_as_queues_and_caches_want(queued: list[float], use: list[float], wanted: int) -> None:
    told = {"queued_tokens": dict(enumerate(queued)), "kv_use": dict(enumerate(use))}
    assert autoscaling(cast(AutoscalingContext, SimpleNamespace(aggregated_metrics=told)))[0] == wanted


def test_options_that_differ_are_passed_on(tmp_path: Path) -> None:
    args = parse_args(["--page-size", "16", "--api-key", "a,b", "--tp", "2"])
    options = server_options(args)
    assert options == {"page_size": 16, "api_key": ("a", "b"), "tensor_parallel_size": 2}
    assert args_from_options({**options, "api_key": ["a", "b"]}) == args, "as JSON has them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": "none"}, "options replicas, max_replicas: expected a whole number from 1 to 4096"),
        ({"router": "best"}, "option router=best"),
        ({"pagesize": 1}, "option pagesize is unknown"),
    ],
)
def test_wrong_options_of_the_application(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(options)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("10.0.0.1", "expected HOST:PORT, as in 10.0.0.1:6379"),
        ("127.0.0.1:port", "expected HOST:PORT"),
        ("127.0.0.1:99999", "expected HOST:PORT"),
        ("", "expected HOST:PORT"),
        ("127.0.0.1:1", r"no Ray answers there \(Connection refused\)"),
        ("[::1]:1", r"no Ray answers there \("),
        ("ray://nowhere.invalid:1", r"no Ray answers there \("),
    ],
)
def test_wrong_addresses(address: str, message: str) -> None:
    with pytest.raises(ConnectionError, match=message):
        reach(address)


def test_an_address_of_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            with other.accept()[0] as client:
                client.sendall(b"220 mail is taken here\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ConnectionError, match=r"no Ray answers there \(something else does\)"):
            reach(f"127.0.0.1:{other.getsockname()[1]}")
        thread.join()


async def test_operators_are_known_by_the_servers_own_rules() -> None:
    """Its guard in front of the route that the ingress asks; without an owner, 409 is what an operator is told."""

    async def info(_: Request) -> JSONResponse:
        return JSONResponse({})

    access = AccessConfig(admin_keys=("mine",), cors_origins=("https://known.example",))
    app = guarded(Starlette(routes=[Route("/server_info", info)]), access, log=False)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_config=None, port=0))
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.001)
        ingress = Ingress(cast(Any, None), {}, "", "prefix")
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        ingress.ready = {"a": {"url": url}}
        key, ours = {"authorization": "Bearer mine"}, {"content-type": "application/json"}
        foreign = {"origin": "https://evil.example"}
        preflight = {"origin": "https://known.example", "access-control-request-method": "POST"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(ingress.app), base_url="http://127.0.0.1") as client:
            for method, path, headers, status in (
                ("POST", "/cluster/drain", key | ours, 409),
                ("POST", "/cluster/scale", key | ours, 409),
                ("POST", "/cluster/drain", key | foreign, 403),
                ("POST", "/cluster/scale", key | ours | {"sec-fetch-site": "cross-site"}, 403),
                ("POST", "/cluster/drain", key | {"content-type": "text/plain"}, 415),
                ("POST", "/cluster/drain", ours, 401),
                ("GET", "/cluster", key, 200),
                ("GET", "/cluster", {}, 401),
                ("DELETE", "/cluster", key, 405),
            ):
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code == status, f"{method} {path} {headers}: {answer.text}"
            assert "replicas" not in (await client.options("/cluster", headers=preflight)).text
        await ingress._relay.session.close()
    finally:
        server.should_exit = True
        await running
