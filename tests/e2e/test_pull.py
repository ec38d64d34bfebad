"""`minisgl pull` with the hubs' own clients and a hub that is a real HTTP server (`tests/fake_hub.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisgl.cli import commands
from minisgl.config.locate import DEMO_MODEL
from minisgl.errors import ConfigError
from tests.e2e.conftest import PYTHONPATH
from tests.fake_hub import Hub
from tests.waiting import poll

FILES = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
MODEL = {**FILES, "pytorch_model.bin": bytes(1_000), "flax_model.msgpack": bytes(1_000)}
GGUF = {"model-Q4_K_M.gguf": b"GGUF" + bytes(70_000), "model-Q8_0.gguf": b"GGUF" + bytes(140_000), "README.md": b"-"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    repos = {"Qwen/Qwen3-0.6B": MODEL, "Qwen/Qwen3-0.6B-GGUF": GGUF, "org/gated": MODEL}
    with Hub(repos, gated=frozenset({"org/gated"})).running() as running:
        yield running


class Home:
    """Where nothing was fetched before."""

    def __init__(self, path: Path, hub: Hub) -> None:
        self.path = path
        self._hub = hub

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        here = {"HF_HOME": str(self.path), "HF_ENDPOINT": self._hub.url, "PYTHONPATH": PYTHONPATH}
        here |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}  # whatever tests in this process have set
        return subprocess.Popen(
            [sys.executable, "-m", "minisgl", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_TOKEN": "", "MODELSCOPE_CACHE": str(self.path / "none"), **here, **env},
        )

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        """Exit status and output of a command."""
        process = self.start(*words, **env)
        out, err = process.communicate(timeout=250)
        assert "Traceback" not in err
        return process.returncode, out, err


@pytest.fixture
def home(tmp_path: Path, hub: Hub) -> Home:
    return Home(tmp_path / "hf", hub)


def test_what_is_needed_is_fetched_once(hub: Hub, home: Home) -> None:
    """A download that was ended goes on with the files that are missing, and what is there needs no hub."""
    hub.stalls = {"model.safetensors"}
    first = home.start("pull", "Qwen/Qwen3-0.6B")
    begun = lambda: len(hub.sent) == len(FILES) - 1 and any(home.path.rglob("*.incomplete"))  # noqa: E731
    poll(begun, "all but one file is there, and a part of that one")
    first.kill()
    first.communicate(timeout=60)
    hub.go_on.set()
    assert "incomplete: minisgl pull goes on" in home.run("ls")[1]
    status, out, _ = home.run("pull", "Qwen/Qwen3-0.6B")
    path = Path(out.rstrip().partition(", in ")[2])
    assert status == 0 and out.startswith("Qwen/Qwen3-0.6B: ")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        name: data for name, data in FILES.items() if name != "README.md"
    }
    assert hub.sent["tokenizer.json"] == len(FILES["tokenizer.json"]) and "pytorch_model.bin" not in hub.sent
    hub.sent.clear()
    assert home.run("pull", "Qwen/Qwen3-0.6B", HF_ENDPOINT="http://127.0.0.1:9")[:2] == (0, out)
    assert not hub.sent
    listed = home.run("ls")[1]
    assert any(line.endswith(" Qwen/Qwen3-0.6B") for line in listed.splitlines()), listed


def test_of_gguf_files_one_is_fetched(hub: Hub, home: Home) -> None:
    status, _, err = home.run("pull", "Qwen/Qwen3-0.6B-GGUF")
    assert status == 2 and "as in Qwen/Qwen3-0.6B-GGUF:Q4_K_M; there are model-Q4_K_M.gguf, model-Q8_0.gguf" in err
    status, out, _ = home.run("pull", "Qwen/Qwen3-0.6B-GGUF:Q8_0")
    assert status == 0 and out.rstrip().endswith("model-Q8_0.gguf")
    assert {name for name in hub.sent if name.endswith(".gguf")} == {"model-Q8_0.gguf"}


def test_what_cannot_be_had_is_told(hub: Hub, home: Home) -> None:
    for name in ("org/gated", "org/nowhere", "Qwen/Qwen3-0.6B@no-such-branch"):
        status, _, err = home.run("pull", name)
        (line,) = [line for line in err.splitlines() if line.startswith("minisgl: error:")]
        assert status == 2 and f"--model {name}: cannot be fetched" in line and "HF_TOKEN" in line
    assert home.run("pull", "org/gated", HF_TOKEN="hf_secret")[0] == 0


def test_modelscope(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own client, which takes two seconds to import: all in this process."""
    pytest.importorskip("modelscope")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setenv("MINISGL_MODEL_SOURCE", "modelscope")
    commands.main(["pull", "Qwen/Qwen3-0.6B"])
    path = Path(capfd.readouterr().out.rstrip().partition(", in ")[2])
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (path / "pytorch_model.bin").exists()
    with pytest.raises(ConfigError, match="say which of its GGUF files"):
        commands.main(["pull", "Qwen/Qwen3-0.6B-GGUF"])
    commands.main(["pull", "Qwen/Qwen3-0.6B-GGUF:Q4_K_M"])
    with pytest.raises(ConfigError, match="MODELSCOPE_API_TOKEN"):
        commands.main(["pull", "org/gated"])
    commands.main(["ls"])
    out = capfd.readouterr().out
    assert " Qwen/Qwen3-0.6B (modelscope)\n" in out and " Qwen/Qwen3-0.6B-GGUF (modelscope)\n" in out
