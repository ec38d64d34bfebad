"""GuideLLM: its command finishes a benchmark of the built-in model, and has measured it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import minisgl
from tests.e2e.conftest import Server

CHECKPOINT = Path(minisgl.__file__).parent / "demo_model"
REQUESTS, OUTPUT_TOKENS = 6, 8


def test_a_benchmark(demo: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = {
        "backend": f"kind=openai_http,target={demo.url}",
        "tokenizer": f"kind=huggingface_auto,model={CHECKPOINT}",
        "data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}",
        "profile": "kind=concurrent,streams=2",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "output": f"kind=json,path={report}",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    ran = subprocess.run(
        [sys.executable, "-m", "guidellm", "run", *words, "--disable-console"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    (made,) = json.loads(report.read_text())["benchmarks"]
    totals = made["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0), made["requests"]["errored"][:1]
    for request in made["requests"]["successful"]:
        assert request["output_tokens"] == OUTPUT_TOKENS and request["prompt_tokens"] >= 32
        assert 0 < request["time_to_first_token_ms"] <= 1000 * request["request_latency"]
    assert made["metrics"]["inter_token_latency_ms"]["successful"]["mean"] > 0
