"""What a cluster is planned to be, before anything is started. Ray's own schema says whether that makes sense."""

from __future__ import annotations

import asyncio
import socket
import threading
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from ray.serve.config import AutoscalingContext

    from minisgl.cluster.address import reach
    from minisgl.cluster.ingress import Ingress, merged
    from minisgl.cluster.serving import Plan, autoscaling, replica_needs, server_options
from minisgl.cluster import app
from minisgl.cluster.router import KV_USE, QUEUED_TOKENS
from minisgl.config.args import args_from_options, parse_args
from minisgl.config.runtime import AccessConfig
from minisgl.errors import ConfigError
from minisgl.server.access import guarded


def needs(
    nodes: list[dict[str, float]], replicas: int = 1, declared: bool = False, **options: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    plan = Plan(options, replicas, replicas, listener="" if declared else "/port")
    return replica_needs(args_from_options(options), plan, nodes)


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


def test_nodes_may_come_later_than_a_configuration() -> None:
    """Which is as KubeRay does it; what replicas take does not change when they do, or all would be replaced."""
    for nodes in ([], [{"CPU": 8.0, "GPU": 1.0}]):
        assert needs(nodes, 2, True, device="cuda", tp=2) == ({"device": "cuda"}, {"num_gpus": 2, "num_cpus": 1.0})
        assert needs(nodes, 2, True, device="cpu", cpu_threads=3, tp=2)[1] == {"num_cpus": 6}
    with pytest.raises(ConfigError, match="find no room on 0 CPUs \\(if more come later, say device"):
        needs([], declared=True)


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
        app(options)


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
    async with ingress_of(app) as (_, client):
        key, ours = {"authorization": "Bearer mine"}, {"content-type": "application/json"}
        foreign = {"origin": "https://evil.example"}
        preflight = {"origin": "https://known.example", "access-control-request-method": "POST"}
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


def test_metrics_of_all_replicas_are_one_page() -> None:
    page = (
        '# HELP a_total Some.\n# TYPE a_total counter\na_total{b="x, y"} 2.0\n# HELP c More.\n# TYPE c gauge\nc 1.0\n'
    )
    text = merged({"one": page, "two": page.replace("2.0", "3.0")})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE") == 2
    samples = {sample.labels["replica"]: (sample.labels["b"], sample.value) for sample in families["a"].samples}
    assert samples == {"one": ("x, y", 2.0), "two": ("x, y", 3.0)}
    assert {sample.labels["replica"] for sample in families["c"].samples} == {"one", "two"}
    assert merged({"one": page + "# EOF\n", "two": page + "# EOF\n"}).endswith("\n# EOF\n")


async def test_however_a_path_is_spelt() -> None:
    """As the server has it: what is of all replicas, and whose an answer is that was kept."""
    asked = list[str]()

    def replica(name: str) -> ASGIApp:
        async def metrics(_: Request) -> Response:
            return Response("# HELP a Some.\n# TYPE a gauge\na 1.0\n", media_type="text/plain")

        async def flush(_: Request) -> JSONResponse:
            return JSONResponse({"status": "ok", "pages": 2})

        async def made(_: Request) -> JSONResponse:
            return JSONResponse({"id": f"resp_{name}"})

        async def kept(request: Request) -> JSONResponse:
            asked.append(name)
            return JSONResponse({"id": request.path_params["id"]})

        routes = [Route("/metrics", metrics), Route("/flush_cache", flush, methods=["POST"])]
        routes += [Route("/v1/responses", made, methods=["POST"]), Route("/v1/responses/{id}", kept)]
        return guarded(Starlette(routes=routes), AccessConfig(), log=False)

    async with ingress_of(replica("a"), replica("b")) as (_, client):
        root = "http://127.0.0.1"  # else two slashes would begin a host
        for path in ("/metrics", "//metrics", "/v1/metrics", "/metrics/", "//v1//metrics"):
            text = (await client.get(root + path)).text
            assert text.count("\na{replica=") == 2, f"{path}: {text}"
        for path in ("/flush_cache", "//flush_cache", "/v1/flush_cache/"):
            assert (await client.post(root + path)).json() == {"status": "ok", "pages": 4}
        made = {(await client.post(root + path)).json()["id"] for path in ["/responses", "//v1/responses/"] * 10}
        assert made == {"resp_a", "resp_b"}
        for name in "ab" * 4:
            for path in ("/responses/resp_{}", "//v1//responses/resp_{}", "/v1/v1/responses/resp_{}/"):
                asked.clear()
                assert (await client.get(root + path.format(name))).json() == {"id": f"resp_{name}"}
                assert asked == [name], path


async def test_bodies_that_are_on_their_way_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of whoever has no key: of eight times what one may have, each is held from its first byte on."""
    monkeypatch.setenv("MINISGL_MAX_BODY_BYTES", "65536")
    gone, headers = asyncio.Event(), [(b"content-length", b"60000")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    scope |= {"raw_path": b"/v1/completions", "http_version": "1.1", "client": ("127.0.0.1", 1)}

    async def receive() -> Message:
        if first:
            return first.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async with ingress_of() as (ingress, client):
        first, sent = [{"type": "http.request", "body": b"{", "more_body": True}] * 9, list[Message]()
        slow = [asyncio.create_task(ingress.asgi({**scope}, receive, send)) for _ in range(8)]
        while ingress.relay.num_in_flight < 8:
            await asyncio.sleep(0.001)
        refused = await client.post("/v1/completions", content=bytes(60_000))
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
        assert "480000 bytes" in refused.text
        slow.append(asyncio.create_task(ingress.asgi({**scope, "client": ("10.0.0.1", 1)}, receive, send)))
        while ingress.relay.num_in_flight < 9:
            await asyncio.sleep(0.001)  # somebody else finds room
        gone.set()
        await asyncio.gather(*slow)
        assert (ingress.relay.num_in_flight, sent) == (0, [])


@asynccontextmanager
async def ingress_of(*apps: ASGIApp) -> AsyncIterator[tuple[Ingress, httpx.AsyncClient]]:
    """In front of servers, and a client of it."""
    servers = [uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_config=None, port=0)) for app in apps]
    running = [asyncio.create_task(server.serve()) for server in servers]
    ingress = Ingress(cast(Any, None), {}, "", "random")
    client = httpx.AsyncClient(transport=httpx.ASGITransport(ingress.asgi), base_url="http://127.0.0.1", timeout=60)
    try:
        while not all(server.started for server in servers):
            await asyncio.sleep(0.001)
        urls = [f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}" for server in servers]
        ingress.relay.meet({url: {"url": url, "events": ["inproc://nobody"]} for url in urls})
        yield ingress, client
    finally:
        ingress.relay.meet({})
        await client.aclose()
        await ingress.relay.session.close()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*running)
