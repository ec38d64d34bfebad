"""`minisgl bench offline` on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisgl import benchmark, simulate
from minisgl.benchmark.shapes import write_shape
from minisgl.errors import ConfigError
from tests.models import BASE, tiny_model
from tests.tokenizers_fixture import make_byte_level

ROOT = Path(__file__).parents[2]


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
    assert document["config"]["resolved"]["page_size"] == 16
    assert all(0 < request["arrivals"][0] <= request["e2e"] for request in document["requests"])


def test_a_workload_that_does_not_fit_is_one_line(model: Path) -> None:
    flags = ["--num-prompts", "1", "--input-len", "600", "--warmup", "0"]
    with pytest.raises(ConfigError, match=r"^--workload mixed: .*600"):
        benchmark.main(["offline", *flags, "--model", str(model), "--num-pages", "64"])


def test_streams_of_a_shape_without_weights_or_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config.json` alone is enough."""
    shape = {**BASE, "vocab_size": 20_000, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    lines = tmp_path / "lines.jsonl"
    flags = ["--workload", "streams", "--streams", "3", "--tokens", "9", "--num-pages", "64", "--warmup", "1"]
    flags += ["--bandwidth", "3e10", "--peak-flops", "1e11", "--json", str(lines)]
    for model in (["--shape", str(tmp_path)], ["--model", str(tmp_path), "--dummy-weight"]):
        assert benchmark.main(["offline", *flags, *model]) == 0
    assert "per step; reached: " in capsys.readouterr().out
    for line in map(json.loads, lines.read_text().splitlines()):
        summary = line["summary"]
        assert summary["num_output"] == 27
        assert 0 < summary["step_floor"] < summary["latencies"]["step"]["p50"] / 1000
        assert 0 < summary["floor"] < summary["duration"]


@pytest.mark.parametrize("workload", ["standard", "streams"])
def test_workloads_fit_the_built_in_model(workload: str, tmp_path: Path) -> None:
    """It has fewer tokens than the workload's ids; ids that are asked for are taken at their word."""
    lines = tmp_path / "lines.jsonl"
    flags = ["--workload", workload, "--num-prompts", "2", "--output-len", "5", "--warmup", "1", "--num-pages", "300"]
    assert benchmark.main(["offline", *flags, "--json", str(lines)]) == 0
    document = json.loads(lines.read_text())
    assert document["config"]["vocab_size"] == 4096
    assert document["summary"]["num_output"] == 10
    with pytest.raises(ConfigError, match="--vocab-size 10001: the model has 4096 tokens"):
        benchmark.main(["offline", *flags, "--vocab-size", "10001"])


def test_steps_are_timed_for_the_simulator(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1 to 64 requests at once, prefills and decodes; what is simulated by them takes about as long."""
    file, out = tmp_path / "steps.json", tmp_path / "out.json"
    flags = ["--num-prompts", "42", "--input-len", "2:100", "--output-len", "1:8", "--model", str(model)]
    assert benchmark.main(["--calibrate", str(file), *flags, "--num-pages", "512"]) == 0
    document = json.loads(file.read_text())
    shares = [shares for shares, _ in document["steps"]]
    assert {len(own) for own in shares} >= {1, 2, 3, 4}
    assert any(count > 1 for own in shares for _, count in own)
    assert all(0 < seconds < 60 for _, seconds in document["steps"])
    assert document["config"]["scheduler"]["num_pages"] == 512
    load = [
        "--prefix-len",
        "0",
        "--input-len",
        "9",
        "--output-len",
        "4",
        "--turns",
        "1",
        "--rate",
        "1",
        "--json",
        str(out),
    ]
    assert simulate.main(["--calibration", str(file), "--model", str(model), "--replicas", "1", *load]) == 0
    assert json.loads(out.read_text())["results"][0]["requests"] == 60


def test_what_features_cost_with_a_stand_in_tokenizer(tmp_path: Path) -> None:
    """The script of features on random weights of a shape: grammars need a tokenizer that covers the vocabulary."""
    shape = {**BASE, "vocab_size": 20_000, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "eos_token_id": 7}))
    model = write_shape(str(tmp_path), tmp_path / "model")
    command = [sys.executable, str(ROOT / "benchmark" / "offline" / "features.py"), "--streams", "2", "--tokens", "8"]
    command += ["--rounds", "1", "--model", str(model), "--dummy-weight", "--num-pages", "64"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == 13  # plain, and six features in all and in half of the streams
