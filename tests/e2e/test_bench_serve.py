"""`minisgl bench serve` against a real server: the two agree on every count."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from minisgl.benchmark.shapes import write_shape
from tests.e2e.conftest import ROOT, Server
from tests.models import BASE


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_load(server: Server, endpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    flags = ["--base-url", server.url, "--endpoint", endpoint, "--num-prompts", "8", "--input-len", "5:10"]
    flags += ["--output-len", "10", "--ignore-eos", "--max-concurrency", "4", "--output", str(output)]
    command = [sys.executable, "-m", "minisgl", "bench", "serve", *flags]
    done = subprocess.run(command, cwd=ROOT / "python", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 done, 0 failed" in done.stdout
    summary = json.loads(output.read_text())["summary"]
    assert summary["num_output"] == 80
    assert summary["num_prompt"] >= 8 * 5
    assert summary["latencies"]["ttft"]["p50"] > 0


def test_every_token_of_a_shape_is_seen(start: Callable[..., Server], tmp_path: Path) -> None:
    """Most ids of a large vocabulary once were no text, and the first token that a client saw came near the end."""
    shape = {**BASE, "vocab_size": 150_000, "hidden_size": 8, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = write_shape(str(tmp_path), tmp_path / "model")
    server = start(["-m", "minisgl", "--model", str(model), "--dummy-weight", "--port", "0", "--num-pages", "64"])
    chat = {"messages": [{"role": "user", "content": "time"}]}
    for endpoint, prompt in (("completions", {"prompt": [7, 8]}), ("chat/completions", chat)):
        body = {**prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 1}
        answer = httpx.post(f"{server.url}/v1/{endpoint}", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 40
        (choice,) = answer["choices"]
        text = choice["text"] if endpoint == "completions" else choice["message"]["content"]
        assert len(text.split()) >= 35  # tokens are words, but for a few of single characters
