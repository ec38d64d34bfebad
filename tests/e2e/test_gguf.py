"""SmolLM2's own GGUF file, served with one command; and files that cannot be, each refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from minisgl.config.args import parse_args
from minisgl.config.resolve import prepare
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError
from tests.e2e.conftest import ROOT, Server
from tests.gguf_files import byte_tokens, write_gguf
from tests.models import tiny_model
from tests.real_model import real_model

pytestmark = pytest.mark.timeout(600)  # the model may have to be fetched first


@pytest.fixture(scope="module")
def path() -> Path:
    (file,) = real_model().rglob("*.gguf")
    return file


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--model", str(path), "--device", "cpu", "--port", "0", "--num-pages", "200"]
    with Server.running(["-m", "minisgl", *flags], tmp_path_factory.mktemp("logs") / "server.log") as running:
        yield running


def test_it_chats(path: Path, server: Server) -> None:
    with server.client() as client:
        (model,) = client.models.list().data
        assert model.id == str(path)
        questions = {
            "What colour is the sky?": "blue",
            "Say hello.": "Hello",
            "Who wrote Romeo and Juliet?": "Shakespeare",
        }
        for name, (question, word) in zip((model.id, path.name, model.id), questions.items(), strict=True):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
            )
            assert word in str(answer.choices[0].message.content)
            assert answer.usage
            assert 30 < answer.usage.prompt_tokens < 45, "the template has a system prompt"
            if word == "Hello":
                assert answer.choices[0].finish_reason == "stop"


def test_its_tokens_form_what_a_schema_wants(server: Server) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    with server.client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "What is the capital of France? Answer in JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
            temperature=0,
        )
    assert list(json.loads(answer.choices[0].message.content or "")) == ["city"]


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def of_another_architecture(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"llama", b"lloma"))


def without_a_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_v", b"blk.1.attn_x"))


def with_a_scale_that_is_none(file: Path) -> None:
    tensor = next(tensor for tensor in gguf.GGUFReader(file, "r+").tensors if tensor.name == "blk.2.ffn_up.weight")
    tensor.data[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)


def as_a_part(file: Path) -> None:
    file.rename(file.with_name("model-00001-of-00002.gguf"))


def beside_another(file: Path) -> None:
    shutil.copy(file, file.with_name("other.gguf"))


def whole(file: Path) -> None:
    """Nothing is wrong with it."""


@pytest.mark.parametrize(
    ("spoil", "flags", "reason"),
    [
        (cut_off, [], "model.gguf: tensor blk.2.attn_v.weight ends at byte"),
        (of_another_architecture, [], "model.gguf: architecture not supported: 'lloma' (supported: llama, qwen2, "),
        (
            without_a_tensor,
            [],
            "missing: model.layers.1.self_attn.v_proj.weight; unexpected: model.layers.1.attn_x.weight",
        ),
        (with_a_scale_that_is_none, [], "model.gguf: tensor blk.2.ffn_up.weight has scales that are infinite, or not"),
        (as_a_part, [], "is incomplete: model-00002-of-00002.gguf missing"),
        (beside_another, [], "holds several models, give one: model.gguf, other.gguf"),
        (whole, ["--quantization", "int8"], "--quantization int8: the weights of"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(
    spoil: Callable[[Path], None], flags: list[str], reason: str, tmp_path: Path
) -> None:
    """By the command for what a child finds while it loads, and for one that the command's own process finds; else by
    what would be run in these processes, without the processes."""
    file, reference = write_gguf(tiny_model("llama"), tmp_path, "Q4_0", **byte_tokens())
    shutil.rmtree(reference)
    spoil(file)
    options = ["--model", str(tmp_path), "--device", "cpu", "--port", "0", *flags]
    if spoil not in (without_a_tensor, cut_off):
        with pytest.raises(ConfigError) as refused:
            config = prepare(parse_args(options, {}))
            create_engine(config.engine, rank=0)
        assert reason in str(refused.value) and "\n" not in str(refused.value)
        return
    command = [sys.executable, "-m", "minisgl", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
