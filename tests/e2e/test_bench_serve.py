"""`minisgl bench serve` against a real server: the two agree on every count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Server


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_load(server: Server, endpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    flags = ["--base-url", f"{server.url}/v1", "--endpoint", endpoint, "--num-prompts", "8", "--input-len", "5:10"]
    flags += ["--output-len", "10", "--ignore-eos", "--max-concurrency", "4", "--output", str(output)]
    command = [sys.executable, "-m", "minisgl", "bench", "serve", *flags]
    done = subprocess.run(command, cwd=ROOT / "python", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 done, 0 failed" in done.stdout
    summary = json.loads(output.read_text())["summary"]
    assert summary["num_output"] == 80
    assert summary["num_prompt"] >= 8 * 5
    assert summary["latencies"]["ttft"]["p50"] > 0
