"""The server that every client calls: the built-in model, as anybody starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.prompts import MODEL
from tests.e2e.conftest import PYTHONPATH, Server


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "demo.log"
    flags = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--served-model-name", MODEL]
    with Server.running(
        ["-m", "minisgl", *flags], log, MINISGL_CHECK_INTEGRITY="1", MINISGL_INTEGRITY_FATAL="1"
    ) as server:
        yield server


@pytest.fixture
def http(demo: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url, timeout=60) as made:
        yield made


def run_client(name: str, *args: str, apart: str = "", **environment: str) -> Any:
    """What a program of this folder prints as JSON. It is a process of its own: see there why.

    `apart`: a list of packages in the folder of that name, which go before the environment's.
    """
    paths = [PYTHONPATH]
    if apart:
        packages = Path(sys.prefix) / "apart" / apart
        assert packages.is_dir(), f"{packages} is missing: `make test-clients` installs it"
        paths.insert(0, str(packages))
    ran = subprocess.run(
        [sys.executable, "-m", "tests.clients.offline", name, *args],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
