"""What README.md shows is run as it stands there, against the built-in model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import PYTHONPATH, ROOT, Server

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
CURL = [text for language, text in BLOCKS if language == "bash" and text.startswith("curl ")]
ADDRESS = "http://127.0.0.1:1919"
EXPECTED = re.compile(r"^ *print\(.*\)  # (.*)$", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.running(["-m", "minisgl", "--port", "0"], tmp_path_factory.mktemp("logs") / "server.log") as running:
        yield running


def run(command: list[str], text: str, server: Server) -> str:
    """What it prints, with this server's address in place of the default."""
    text = text.replace(ADDRESS, server.url)
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_blocks_print_what_they_say(server: Server) -> None:
    """The blocks go on from one another, as a reader would type them."""
    script = "\nprint()\n".join(PYTHON)  # the end of a stream is no end of a line
    printed = run([sys.executable, "-W", "ignore", "-"], script, server)
    assert len(PYTHON) >= 3 and ADDRESS in script
    expected = EXPECTED.findall(script)
    assert [line for line in printed.splitlines() if line in expected] == expected
    (call,) = [line for line in expected if line.startswith("get_weather ")]
    assert json.loads(call.removeprefix("get_weather ")) == {"city": "Paris"}
    assert "name='Anna' age=31 city='Rome'" in expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_blocks_are_answered(server: Server) -> None:
    assert CURL
    for block in CURL:
        (answer,) = json.loads(run(["bash", "-s"], block, server))["choices"]
        assert answer["text"] and answer["finish_reason"] in ("stop", "length")
