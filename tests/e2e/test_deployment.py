"""The files of docs/howto for containers and for watching: taken by the programs that they are for, or by their
published schemas, and what they say of a server is true of one."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from minisgl.config.args import parse_args
from tests.e2e.conftest import ROOT, Server
from tests.waiting import poll

HOWTO = ROOT / "docs" / "howto"
PROMETHEUS = shutil.which("prometheus")
DASHBOARD = json.loads((HOWTO / "grafana.json").read_text())
REQUIRED = bool(os.environ.get("REQUIRE_DEPLOYMENT"))


def kubernetes(kind: str) -> Any:
    documents = list(yaml.safe_load_all((HOWTO / "kubernetes.yaml").read_text()))
    return next(document for document in documents if document["kind"] == kind)


# Compose


@pytest.mark.skipif(not shutil.which("docker-compose") and not REQUIRED, reason="needs docker-compose")
@pytest.mark.parametrize("service", ["minisgl", "minisgl-gpu"])
def test_compose_reads_its_file(service: str) -> None:
    command = ["docker-compose", "-f", str(HOWTO / "compose.yaml"), "config"]
    read = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "MINISGL_API_KEY": "key"}, check=False
    )
    assert read.returncode == 0, read.stderr
    config = yaml.safe_load(read.stdout)["services"][service]
    args, access = parse_args(config["command"]), config["environment"]
    assert args.model_path and access["MINISGL_API_KEY"] == "key"
    assert args.drain_timeout < float(config["stop_grace_period"].removesuffix("s"))
    dockerfile = (ROOT / config["build"]["dockerfile"]).read_text()
    for volume in config["volumes"]:  # what the image has there, and whose it is, is what a new volume begins with
        assert re.search(rf"(install -d -o minisgl|chown -R minisgl)[^&]* {volume.split(':')[1]}\b", dockerfile)


def test_compose_wants_a_key() -> None:
    if not shutil.which("docker-compose"):
        pytest.skip("needs docker-compose")
    command = ["docker-compose", "-f", str(HOWTO / "compose.yaml"), "config"]
    env = {name: value for name, value in os.environ.items() if name != "MINISGL_API_KEY"}
    read = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert read.returncode and "set it to a key" in read.stderr


# Kubernetes


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_schemas_take_the_manifests(version: str) -> None:
    validate = importlib.import_module("kubernetes_validate").validate
    for document in yaml.safe_load_all((HOWTO / "kubernetes.yaml").read_text()):
        validate(document, version, strict=True)


def test_a_pod_starts_is_asked_and_ends_in_time(start: Callable[..., Server]) -> None:
    """With the manifest's arguments and variables, but for the model: each probe, and then what an end is."""
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = container["args"]
    assert args[0] == "--model"
    values = {entry["name"]: entry.get("value", "the-key") for entry in container["env"]}
    own = {name: value for name, value in values.items() if not value.startswith("/cache/")}
    service = kubernetes("Service")["metadata"]["name"].upper()
    assert service == "MINISGL" and pod["enableServiceLinks"] is False  # else MINISGL_PORT=tcp://…
    server = start(["-m", "minisgl", *args[2:], "--host", "0.0.0.0", "--port", "0"], **own)
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    for probe in probes.values():  # without a key, as kubelet asks
        assert httpx.get(url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"]).status_code == 200
    assert httpx.get(f"{url}/v1/models").status_code == 401
    key = {"Authorization": f"Bearer {own['MINISGL_API_KEY']}"}
    body = {"prompt": "Once upon a time", "max_tokens": 600, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=key, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        path = probes["readiness"]["httpGet"]["path"]
        poll(lambda: httpx.get(url + path).status_code == 503, "not ready while it drains")
        assert httpx.get(url + probes["liveness"]["httpGet"]["path"]).status_code == 200
        assert list(lines)[-2:] == ["data: [DONE]", ""]  # the answer is complete
    assert server.wait_exit() == 0
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before + parse_args(args).drain_timeout + 10 <= pod["terminationGracePeriodSeconds"]


# Prometheus and Grafana


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["-m", "minisgl", "--port", "0", "--admin-key", "YOUR-ADMIN-KEY"]
    with Server.running(flags, tmp_path_factory.mktemp("watched") / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(watched: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. It scrapes the server as the page's file says, but more often."""
    assert PROMETHEUS is not None
    folder = tmp_path_factory.mktemp("prometheus")
    config = (HOWTO / "prometheus.yml").read_text().replace("scrape_interval: 15s", "scrape_interval: 500ms")
    assert "127.0.0.1:1919" in config
    (folder / "prometheus.yml").write_text(config.replace("127.0.0.1:1919", watched.url.removeprefix("http://")))
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([PROMETHEUS, *flags], cwd=folder, stdout=log, stderr=log)
    try:
        found: list[str] = []

        def listens() -> bool:
            found[:] = re.findall(r"Listening on\".* address=(127\.0\.0\.1:\d+)", (folder / "log").read_text())
            assert process.poll() is None, (folder / "log").read_text()
            return bool(found)

        poll(listens, "Prometheus listens")
        yield f"http://{found[0]}/api/v1"
    finally:
        process.terminate()
        process.wait(20)


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


@pytest.mark.skipif(not PROMETHEUS and not REQUIRED, reason="needs prometheus")
def test_each_expression_of_the_dashboard_has_a_value(watched: Server, prometheus: str) -> None:
    def ask(path: str, **params: str) -> Any:
        answer = httpx.get(f"{prometheus}/{path}", params=params, timeout=60).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def scrapes() -> int:
        found = ask("query", query='count_over_time(up{job="minisgl"}[1h]) and up == 1')["result"]
        return int(found[0]["value"][1]) if found else 0

    poll(lambda: scrapes() >= 1, "a first scrape")
    with watched.client() as client:
        for _ in range(3):
            client.completions.create(model="minisgl-demo", prompt="Once upon a time, " * 8, max_tokens=20)
    before = scrapes()
    poll(lambda: scrapes() >= before + 2, "scrapes of what was done")
    for variable in DASHBOARD["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
        assert ask(f"label/{label}/values", **{"match[]": metric})
    (alerts,) = re.findall(r"^```promql\n(.*?)^```$", (HOWTO / "grafana.md").read_text(), re.S | re.M)
    asked = [*expressions(), *(re.split(" [=>]", alert)[0] for alert in alerts.splitlines())]
    assert len(expressions()) > 30 and len(asked) == len(expressions()) + 3
    shown = httpx.get(f"{watched.url}/metrics", headers={"Authorization": "Bearer YOUR-ADMIN-KEY"}).text
    for expression in asked:
        query = expression.replace("$__rate_interval", "1m").replace('"$model"', '".*"').replace('"$instance"', '".*"')
        result = ask("query", query=query)["result"]
        has_value = result and all(row["value"][1] != "NaN" for row in result)
        assert has_value or "worker_restarts" in expression, expression  # there is none before the first
        for name in re.findall(r"(?:minisgl:|http_|process_)\w+", expression):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert re.search(rf"^# TYPE ({name}|{family}) ", shown, re.MULTILINE), name


def test_the_page_shows_the_file_of_prometheus() -> None:
    file = (HOWTO / "prometheus.yml").read_text().partition("\n")[2]
    assert f"```yaml\n{file}```" in (HOWTO / "grafana.md").read_text()


def test_the_dashboard_is_one() -> None:
    """Grafana's own classes read it, and lose nothing of it."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="needs Python 3.11")
    encoder = importlib.import_module("grafana_foundation_sdk.cog.encoder").JSONEncoder
    read = json.loads(encoder(sort_keys=True).encode(models.Dashboard.from_json(DASHBOARD)))
    assert_within(DASHBOARD, read, "dashboard")
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def assert_within(part: Any, whole: Any, path: str) -> None:
    """What was written is there again; defaults may have come beside it."""
    if isinstance(part, dict):
        assert part.keys() <= whole.keys(), (path, part.keys() - whole.keys())
        for key, value in part.items():
            assert_within(value, whole[key], f"{path}.{key}")
    elif isinstance(part, list):
        assert len(part) == len(whole), path
        for index, value in enumerate(part):
            assert_within(value, whole[index], f"{path}[{index}]")
    else:
        assert part == whole, path
