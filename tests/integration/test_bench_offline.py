"""`minisgl bench offline` on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minisgl import benchmark
from minisgl.errors import ConfigError
from tests.models import tiny_model
from tests.tokenizers_fixture import make_byte_level


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3", vocab_size=400), path)
    return make_byte_level(path)


def test_offline_run_counts_what_it_generated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    flags = ["--num-prompts", "3", "--input-len", "5", "--output-len", "4", "--warmup", "1", "--output", str(output)]
    assert benchmark.main(["offline", *flags, "--model", str(model), "--num-pages", "64"]) == 0
    assert "3 done, 0 failed" in capsys.readouterr().out
    document = json.loads(output.read_text())
    assert document["summary"]["num_prompt"] == 15
    assert document["summary"]["num_output"] == 12
    assert set(document["summary"]["latencies"]) == {"ttft", "tpot", "e2e"}
    assert "num_pages" in document["config"]["engine"]
    assert all(0 < request["arrivals"][0] <= request["e2e"] for request in document["requests"])


def test_a_workload_that_does_not_fit_is_one_line(model: Path) -> None:
    flags = ["--num-prompts", "1", "--input-len", "600", "--warmup", "0"]
    with pytest.raises(ConfigError, match=r"^--workload standard: prompt 0: .*600"):
        benchmark.main(["offline", *flags, "--model", str(model), "--num-pages", "64"])
