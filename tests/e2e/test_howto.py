"""The files that how-to pages show are taken by the programs that they are for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from minisgl.config.args import args_from_options
from tests.e2e.conftest import ROOT, Server, fake
from tests.waiting import poll

NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")


def block(page: str, language: str) -> str:
    text = (ROOT / "docs" / "howto" / page).read_text()
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return str(found)


@pytest.mark.skipif(not NGINX and not os.environ.get("REQUIRE_NGINX"), reason="needs nginx")
def test_nginx_passes_streams_on_as_they_come(
    start: Callable[..., Server], model_path: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    server = start(fake(model_path, delay=0.3, allowed_hosts="llm.example.org"))
    site = block("nginx.md", "nginx").replace("127.0.0.1:1919", server.url.removeprefix("http://"))
    site = site.replace("listen 80;", f"listen 127.0.0.1:{unused_tcp_port};")
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {folders}\n{site} }}"
    )
    assert NGINX is not None
    proxy = subprocess.Popen([NGINX, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)])
    try:
        url, host = f"http://127.0.0.1:{unused_tcp_port}", {"Host": "llm.example.org"}
        poll((tmp_path / "pid").is_file, "nginx does not start")
        body = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=host, timeout=60) as answer:
            pieces = list(answer.iter_raw())
        assert answer.status_code == 200 and sum(map(len, pieces)) < 4096, "it would fit in a buffer, and come whole"
        assert len(pieces) > 3, pieces
        assert pieces[-1].endswith(b"data: [DONE]\n\n")
        assert httpx.get(url, headers={"Host": "elsewhere.example"}).status_code == 403
    finally:
        proxy.terminate()
        proxy.wait(20)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one(tmp_path: Path) -> None:
    unit = (
        block("systemd.md", "ini")
        .replace("/var/lib/minisgl/venv/bin/minisgl", "/bin/true")
        .replace("User=minisgl\n", "")
    )
    (tmp_path / "minisgl.service").write_text(unit.replace("WorkingDirectory=/var/lib/minisgl\n", ""))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "minisgl.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "minisgl.service" not in done.stderr, done.stderr  # other units of the machine are not ours


def test_the_file_of_options_has_options() -> None:
    options = yaml.safe_load(block("systemd.md", "yaml"))
    args = args_from_options({name.replace("-", "_"): value for name, value in options.items()})
    assert (args.port, args.quantization) == (1919, "int4")
